"""Two models on the same items: the right test for each kind of metric, and nothing compared that was asked differently."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
from score_rows import score

from megatron_ttl.errors import DataError
from megatron_ttl.evaluate.compare import compare, print_comparison
from megatron_ttl.evaluate.evaluate_tasks import items_path
from megatron_ttl.evaluate.pack_functions import macro_f1
from megatron_ttl.evaluate.records import SCORES_FILE, append_records
from megatron_ttl.evaluate.significance import mcnemar, paired_difference

RIGHT = {"a": [1, 1, 1, 1, 1, 1, 1, 0, 1, 0], "b": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]}


def keep(folder, model, metrics, task="arc_pt", **others) -> None:
    """Write scores and items; of each metric the values by item, and how they become the score."""
    records = [score(task, aggregate(values), model, metric=metric, n=len(values), main=number == 0, **others)
               for number, (metric, (values, aggregate)) in enumerate(metrics.items())]
    append_records(folder / SCORES_FILE, records)
    path = items_path(folder / SCORES_FILE, records[0])
    path.parent.mkdir(exist_ok=True)
    rows = [{"item": number, "target": number % 3, "answers": [0.0], **{metric: values[number] for metric, (values, _)
                                                                        in metrics.items()}} for number in range(10)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def mean(values) -> float:
    return sum(values) / len(values)


@pytest.fixture
def models(tmp_path):
    for model, right in RIGHT.items():
        soft = [0.6 * value + 0.01 * number for number, value in enumerate(right)]
        pairs = [[number % 2, number % 2 if value else 1 - number % 2] for number, value in enumerate(right)]
        keep(tmp_path / model, model, {"acc": (right, mean), "mc2": (soft, mean), "f1": (pairs, macro_f1),
                                       "odd": (pairs, lambda pairs: 0.5)})
    return tmp_path


def test_every_kind_of_metric(models, capsys):
    rows = compare(models / "a", models / "b" / SCORES_FILE, metrics=["acc", "mc2", "f1"])
    acc, soft, f1 = rows
    test = mcnemar([value == 1 for value in RIGHT["a"]], [value == 1 for value in RIGHT["b"]])
    assert (acc["first"], acc["second"], acc["only_first"], acc["only_second"], acc["n"]) == (0.8, 0.3, 6, 1, 10)
    assert acc["p"] == test.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert acc["low"] < acc["difference"] == 0.5 < acc["high"]
    assert soft["only_first"] is None and soft["difference"] == pytest.approx(0.3) and soft["p"] < 0.3
    sides = [[(number % 2, number % 2 if value else 1 - number % 2) for number, value in enumerate(right)]
             for right in RIGHT.values()]
    assert f1["p"] == paired_difference(*sides, macro_f1, resamples=999).p_value
    assert f1["low"] < f1["difference"] < f1["high"] and f1["high"] > 0.5
    print_comparison(rows)
    out = capsys.readouterr().out
    assert out.startswith("a against b") and "3 of them find 0.15 below 0.05 by chance" in out
    assert [row["metric"] for row in compare(models / "a", models / "b")] == ["acc"], "the score of each task"


def test_a_step_of_a_run_is_chosen(tmp_path):
    for step, right in ((100, RIGHT["b"]), (200, RIGHT["a"])):
        keep(tmp_path / "run", "run", {"acc": (right, mean)}, model_step=step, model_checksum=f"xxh3:{step}")
    row, = compare(f"{tmp_path / 'run'}@100", tmp_path / "run")
    assert (row["first_model"], row["second_model"], row["difference"]) == ("run @ 100", "run @ 200", -0.5)
    with pytest.raises(DataError, match="run@300: has no scores of step 300; it must be one of 100, 200"):
        compare(f"{tmp_path / 'run'}@300", tmp_path / "run")


def test_what_cannot_be_compared_is_refused(models):
    with pytest.raises(DataError, match="arc_pt: odd: is not known to come from its items; .*perplexity, can be compared"):
        compare(models / "a", models / "b", metrics=["odd"])
    keep(models / "c", "c", {"acc": (RIGHT["a"], mean)}, shots=0)
    with pytest.raises(DataError, match="arc_pt: acc: 25 shots in .*a, 0 shots in .*c; both must have been asked the same"):
        compare(models / "a", models / "c")
    keep(models / "d", "d", {"acc": (RIGHT["a"], mean)}, task="bluex")
    with pytest.raises(DataError, match="have no score of the same task and metric"):
        compare(models / "a", models / "d")
    items, = (models / "b").glob("scores/*.gz")
    rows = gzip.decompress(items.read_bytes()).splitlines()
    for payload, message in ((gzip.compress(b"\n".join(rows[:9]) + b"\n"), "the items of a and b are not the same"),
                             (gzip.compress(b'{"item": 1}\n[]\n'), "is no file of items"),
                             (gzip.compress(b'{"item": "1"}\n'), "is no file of items"),
                             (gzip.compress(b" " * (32 << 20) + b"1\n" + b" " * (33 << 20), 1), "unpacks to more than 64 MiB"),
                             (items.read_bytes()[:60], "the packed file ends in the middle")):
        items.write_bytes(payload)
        with pytest.raises(DataError, match=message):
            compare(models / "a", models / "b")
    items.unlink()
    with pytest.raises(DataError, match="does not exist; it must hold the items behind the scores; .* --again"):
        compare(models / "a", models / "b")


@pytest.mark.slow
def test_the_command(repository, models):
    def run(*arguments):
        return subprocess.run([sys.executable, str(repository / "tools" / "scores.py"), *map(str, arguments)],
                              capture_output=True, text=True, timeout=120)

    done = run(models / "a", models / "b", "--metrics", "acc,mc2", "--output", models / "table.md")
    assert done.returncode == 0, done.stderr
    assert "| a | 80.00 ± 1.25 |" in (models / "table.md").read_text(encoding="utf-8").replace("**", "")
    done = run("--compare", models / "a", models / "b", "--task", "arc_pt", "--format", "json")
    assert done.returncode == 0 and json.loads(done.stdout)["comparisons"][0]["only_first"] == 6
    done = run(models / "none")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr

"""README.md does what it says: every command of its walk is run, in order, in a fresh folder."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import documents

from megatron_ttl.runtime import free_port

pytestmark = pytest.mark.slow


def commands(repository: Path, heading: str) -> list[str]:
    """Return the shell commands of the first block under a heading."""
    section = (repository / "README.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repository) -> Path:
    """A working folder with what a clone has."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("pretrain_ttl.py", "tools", "configs", "examples"):
        (place / name).symlink_to(repository / name)
    return place


def run(command: str, folder: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one command with this environment's programs first on the path."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=400)
    assert done.returncode == expected, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_the_walk_works(repository, folder):
    """From the sample corpus to generated text; the run learns."""
    walk = [line for line in commands(repository, "A walk on a CPU") if not line.startswith("source ")]
    assert [shlex.split(line)[0] for line in walk].count("deepspeed") == 1
    outputs = {line: run(line.replace("--num_gpus 1", f"--num_gpus 1 --master_port {free_port()}"), folder) for line in walk}
    rows = [json.loads(line) for line in (folder / "runs/debug/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses[0] > 7 and losses[-1] < 5.5
    assert all("energy_kwh" in row for row in rows if row["event"] == "train")
    assert "Era uma vez" in outputs[walk[-1]].stdout
    assert re.search(r"perplexity", outputs[walk[-2]].stdout)


def test_the_evaluation_works(repository, folder):
    """What the walk has left is scored, shown in a table and drawn."""
    outputs = [run(line, folder).stdout for line in commands(repository, "Evaluation")]
    assert "agreement_pt" in outputs[0] and "arc_pt_ttl" in outputs[0]
    scores = [json.loads(line) for line in (folder / "models/debug/scores.jsonl").read_text().splitlines()]
    assert {score["task"] for score in scores} == {"agreement_pt", "cloze_pt", "continuation_pt"}
    assert all(score["n"] == 20 and score["model"]["tokens"] for score in scores)
    steps = [json.loads(line)["model"]["step"] for line in (folder / "runs/debug/scores.jsonl").read_text().splitlines()]
    assert len(set(steps)) >= 2, "every checkpoint"
    assert "average" in outputs[3]
    assert (folder / "report/debug/report.html").is_file()


def test_the_same_numbers_from_every_launcher(repository, folder):
    """plain python, torchrun and deepspeed: the same losses, digit for digit."""
    options = ("pretrain_ttl.py --deepspeed_config configs/cpu.json --config configs/debug.toml train.steps=5 "
               "schedule.decay_steps=2 schedule.warmup_steps=2 log.every_steps=1 evaluation.max_tokens=512")
    launchers = {"python": "python", "torchrun": f"torchrun --master_port {free_port()} --nproc_per_node 1",
                 "deepspeed": f"deepspeed --num_gpus 1 --master_port {free_port()}"}
    losses = {}
    for name, launcher in launchers.items():
        run(f"{launcher} {options} run.dir=runs/{name}", folder)
        rows = map(json.loads, (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if row["event"] == "train"]
    assert len(losses["python"]) == 5
    assert losses["python"] == losses["torchrun"] == losses["deepspeed"]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("deepspeed_allreduce_buffer")]


def test_the_real_thing_is_spelt_right(repository, folder):
    """The commands for one's own text, on small text: the data ones run, the training ones as dry runs."""
    lines = [json.dumps({"text": text}) for text in documents(400)]
    (folder / "a.jsonl").write_text("\n".join(lines[:200]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as handle:
        handle.write("\n".join(lines[200:] * 8) + "\n")
    for line in commands(repository, "The real thing"):
        if line.startswith("deepspeed pretrain_ttl.py"):
            small = " train.sequence_length=64 train.tokens_per_step=8192 evaluation.max_tokens=64"
            dry = line.replace("deepspeed ", "python ").replace(" --dry-run", "") + " --dry-run" + small
            done = run(dry, folder)
            assert "162,417,408" in done.stdout
        elif "convert_to_hf" in line:
            done = run(line, folder, expected=2)
            assert "runs/ttl_160m" in done.stderr and "Traceback" not in done.stderr
        else:
            run(line.replace("--vocab-size 32000", "--vocab-size 350"), folder)


def test_every_tool_is_documented_and_quick_to_explain_itself(repository):
    """Each tool stands in README.md, and --help needs no heavy import."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    heavy = "import sys, runpy; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
            "finally: assert not {'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)"
    for tool in [repository / "pretrain_ttl.py", *sorted((repository / "tools").glob("*.py"))]:
        assert tool.name in readme, tool.name
        done = subprocess.run([sys.executable, "-c", heavy, str(tool)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout


def test_mistakes_of_a_new_user_take_one_screen(folder, tmp_path):
    """A missing file, a typo in a key, a wrong dataset: faults with what to do, exit code 2, no traceback."""
    for command, expected in (
        ("python pretrain_ttl.py --deepspeed_config configs/cpuu.json", "configs/cpuu.json"),
        ("python pretrain_ttl.py --deepspeed_config configs/cpu.json --config configs/debug.toml optimizer.lrr=1",
         "did you mean 'optimizer.lr'"),
        ("python tools/preprocess_data.py --input nothing.jsonl --tokenizer nowhere --output-prefix x", "nothing.jsonl"),
        ("python tools/generate.py --model models/none --prompt x", "models/none"),
    ):
        error = run(command, folder, expected=2).stderr
        assert expected in error and "Traceback" not in error
        assert len(error.splitlines()) < 25


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_knows_its_targets(repository):
    """`make -n` of the three documented targets."""
    for target in ("install", "test", "demo"):
        subprocess.run(["make", "-n", target], cwd=repository, check=True, capture_output=True)


def test_a_day_works(repository, folder):
    """examples/README.md names every numbered script, and all of them run in order."""
    scripts = sorted((repository / "examples").glob("[0-9][0-9]_*.sh"))
    listed = re.findall(r"bash (examples/\d\d_\w+\.sh)", (repository / "examples/README.md").read_text(encoding="utf-8"))
    assert listed == [f"examples/{script.name}" for script in scripts]
    day = folder.parent / "day"
    shutil.copytree(repository / "examples", day / "examples")
    for name in ("pretrain_ttl.py", "tools", "configs"):
        (day / name).symlink_to(repository / name)
    done = [run(f"bash {script}", day) for script in listed]
    assert "left with" in done[4].stdout
    rows = [json.loads(line) for line in (day / "runs/day/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"][-1] == 200

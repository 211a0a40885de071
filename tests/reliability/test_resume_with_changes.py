"""A run that goes on with other settings: what was confirmed takes effect from that step on, the rest is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import documents, write_dataset, write_tokenizer
from tiny_session import train_here, write_data, write_settings

from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.checkpoint.store import CheckpointStore
from megatron_ttl.config.load import load_settings
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.errors import CheckpointError, ConfigError
from megatron_ttl.model.llama import build_model
from megatron_ttl.plan.forecast import dry_run, print_forecast
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.run_folder import RunFolder
from megatron_ttl.train.schedule import Schedule

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
STEPS, SWITCH = 8, 4
BASE = [f"train.steps={STEPS}", "schedule.warmup_steps=2", "optimizer.eps=1e-5", "evaluation.every_steps=100"]
CHANGED = {"optimizer.betas": [0.6, 0.7], "optimizer.eps": 1e-3, "optimizer.weight_decay": 5.0, "optimizer.lr": 2e-2,
           "train.gradient_clipping": 0.05, "optimizer.decay_norms": True, "optimizer.decay_embeddings": False,
           "train.tokens_per_step": 512, "schedule.min_lr": 5e-3}
ALLOW = ("optimizer", "train.gradient_clipping", "train.tokens_per_step", "schedule.min_lr")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, settings, and a run that was stopped at step 4 of 8."""
    folder = tmp_path_factory.mktemp("place")
    deepspeed, run = write_settings(folder, write_data(folder / "data"), folder / "run")
    assert run_distributed(train_here, 1, str(deepspeed), str(run), BASE, SWITCH) == [85]
    return folder


def overrides_of(changes):
    text = {key: json.dumps(value) for key, value in changes.items()}
    return [o for o in BASE if o.partition("=")[0] not in text] + [f"{key}={value}" for key, value in text.items()]


def settings(place, *overrides, allow=()):
    given = {o.partition("=")[0] for o in overrides}
    return load_settings(place / "machine.json", place / "run.toml",
                         [o for o in BASE if o.partition("=")[0] not in given] + list(overrides), allow)


def begin_and_change(mesh, run, files, stages):
    """Under each ZeRO stage: four steps, then four with everything changed."""
    for stage in stages:
        folder = [f"run.dir={run}/stage{stage}"]
        assert train_here(mesh, files[stage], files["run"], BASE + folder, stop_after=SWITCH) == 85
        assert train_here(mesh, files[stage], files["run"], overrides_of(CHANGED) + folder, allow=ALLOW) == 0


def plain_loop(place, changes):
    """torch's AdamW on the same samples, without DeepSpeed; other settings from the fifth step on."""
    first, then = settings(place).run, settings(place, *overrides_of(changes)).run
    data = CausalLMDataset([(str(place / "data/train"), 1.0)], first.train.sequence_length, first.run.seed)
    model = build_model(first.model, first.run.seed)
    moments, rows, position = {}, [], 0
    for step in range(1, STEPS + 1):
        run = first if step <= SWITCH else then
        optimizer = torch.optim.AdamW(groups(model, run.optimizer), lr=Schedule.of(run).at(step),
                                      betas=run.optimizer.betas, eps=run.optimizer.eps)
        optimizer.state.update(moments)
        count = run.train.tokens_per_step // run.train.sequence_length
        ids, labels = data.samples(list(range(position, position + count)))
        position += count
        logits = model(torch.from_numpy(ids)).flatten(0, 1)[:, : run.model.vocab_size]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels).flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        moments = optimizer.state
        rows.append((loss.item(), float(norm)))
    weights = {}
    for name, tensor in model.state_dict().items():
        weights |= split_to_hf(name, tensor, first.model)
    return torch.tensor(rows), weights, position


def groups(model, config):
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays = config.decay_norms if parameter.dim() == 1 else config.decay_embeddings or "embed" not in name
        decayed[decays].append(parameter)
    return [{"params": decayed[True], "weight_decay": config.weight_decay},
            {"params": decayed[False], "weight_decay": 0.0}]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([(row["loss"], row["grad_norm"]) for row in rows if row["event"] == "train"])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_confirmed_settings_take_effect_under_every_stage(place, tmp_path, processes):
    """Nine settings at once: losses, norms and weights are those of a plain loop that switches at the same step; and
    of no loop that leaves out one of them.
    """
    files = {"run": str(place / "run.toml")}
    for stage in range(4):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2,
                                                            "zero_optimization": {"stage": stage}}))
        files[stage] = str(tmp_path / f"{stage}.json")
    run_distributed(begin_and_change, processes, tmp_path, files, range(4))
    expected, weights, position = plain_loop(place, CHANGED)
    for stage in range(4):
        found = rows_of(tmp_path / f"stage{stage}")
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        kept = CheckpointStore(tmp_path / f"stage{stage}/checkpoints").latest_valid()
        ours = kept.tensors("weights")
        assert max(float((ours[name] - weights[name]).abs().max()) for name in weights) < 2e-5, stage
        assert (kept.record["consumed_samples"], kept.record["consumed_tokens"]) == (position, 4 * 256 + 4 * 512)
    for left_out in CHANGED:
        _, others, _ = plain_loop(place, {key: value for key, value in CHANGED.items() if key != left_out})
        assert max(float((others[name] - weights[name]).abs().max()) for name in weights) > 1e-3, left_out


def test_settings_of_record_are_those_in_force(place, tmp_path):
    """Confirmed once, not asked again; going back is a change; the list says when what was changed."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    arguments = (str(place / "machine.json"), str(place / "run.toml"))
    changed = [*overrides_of({"optimizer.lr": 2e-2, "log.wandb_project": "other"}), f"run.dir={run}"]
    assert run_distributed(train_here, 1, *arguments, changed, 6, ("optimizer",)) == [85]
    stored = json.loads((run / "settings.json").read_text())
    assert stored["run"]["optimizer"]["lr"] == 2e-2 and stored["profile"]["zero_optimization"]["stage"] == 1
    assert stored["changes"] == [
        {"step": 4, "field": "run.dir", "old": str(place / "run"), "new": str(run), "verdict": "allowed"},
        {"step": 4, "field": "optimizer.lr", "old": 1e-2, "new": 2e-2, "verdict": "confirmed"},
        {"step": 4, "field": "log.wandb_project", "old": "megatron_ttl", "new": "other", "verdict": "allowed"}]
    message = "optimizer.lr: was 0.02 in the run so far, is now 0.01; .*--allow-change optimizer.lr"
    with pytest.raises(ConfigError, match=message):
        RunFolder(settings(place, f"run.dir={run}")).starting_point()
    assert run_distributed(train_here, 1, *arguments, changed) == [0]
    after = json.loads((run / "settings.json").read_text())
    assert after["changes"] == stored["changes"] and after["run"] == stored["run"]


def command(place, *arguments):
    return [sys.executable, "pretrain_ttl.py", "--deepspeed_config", str(place / "machine.json"), "--config",
            str(place / "run.toml"), *arguments]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_command_shows_a_table_and_names_the_flag(repository, place, tmp_path, more):
    """Every change on the screen, what was confirmed and what was not; exit code 2; also by --dry-run."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    changed = [*overrides_of({"optimizer.lr": 2e-2, "train.steps": 5, "log.every_steps": 2}), f"run.dir={run}"]
    done = subprocess.run(command(place, *more, "--allow-change", "optimizer", *changed), cwd=repository,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(r"error: command line: train.steps: was 8 in the run so far, is now 5; .*; set it back, or add "
                        r"--allow-change train.steps\n", done.stderr), done.stderr
    if not more:
        assert re.search(r"changed since .* was last started \(at step 4 now\):\n +setting +so far +now +verdict\n",
                         done.stdout)
        for row in (r"optimizer.lr +0.01 +0.02 +confirmed", r"train.steps +8 +5 +to be confirmed",
                    r"log.every_steps +1 +2 +allowed"):
            assert re.search(row, done.stdout), done.stdout


def test_a_dry_run_shows_confirmed_changes(place, capsys):
    plan = dry_run(place / "machine.json", place / "run.toml", overrides_of({"optimizer.lr": 2e-2}), 1, ("optimizer",))
    assert plan["changes"] == [{"setting": "optimizer.lr", "so far": "0.01", "now": "0.02", "verdict": "confirmed"}]
    print_forecast(plan, False)
    assert re.search(r"optimizer.lr +0.01 +0.02 +confirmed", capsys.readouterr().out)
    assert "changes" not in dry_run(place / "machine.json", place / "run.toml", BASE, 1)


def starting_point(mesh, files, overrides, allow):
    """Return what a process prints and raises."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            RunFolder(load_settings(*files, overrides, allow)).starting_point(mesh)
        except ConfigError as error:
            return said.getvalue(), error.faults
    return said.getvalue(), []


def test_several_processes_say_it_once_and_agree(place):
    """Two processes: the table from the first alone, the same faults on both."""
    files = (str(place / "machine.json"), str(place / "run.toml"))
    changed = overrides_of({"optimizer.lr": 2e-2, "run.seed": 8})
    (said, faults), (other_said, other_faults) = run_distributed(starting_point, 2, files, changed, ("optimizer",))
    assert "optimizer.lr" in said and "confirmed" in said and other_said == ""
    assert faults == other_faults and len(faults) == 1 and "run.seed: was 7" in faults[0]


def test_an_end_before_the_checkpoint_is_refused(place):
    with pytest.raises(ConfigError, match="train.steps: the run would end after 3 steps, .* is at step 4"):
        RunFolder(settings(place, "train.steps=3", allow=("train.steps",))).starting_point()
    checkpoint, _ = RunFolder(settings(place, "train.steps=4", allow=("train.steps",))).starting_point()
    assert checkpoint.step == 4


def copy_of_place(place, folder):
    """Copy the run, its data and its files; the run file names the old places."""
    for name in ("run", "data"):
        shutil.copytree(place / name, folder / name)
    for name in ("machine.json", "run.toml"):
        shutil.copy(place / name, folder / name)
    return folder


def moved(folder):
    return [f"run.dir={folder}/run", f'data.sources=[{{prefix="{folder}/data/train"}}]',
            f'evaluation.prefixes=["{folder}/data/held"]']


def test_a_moved_run_with_moved_data_goes_on(place, tmp_path):
    """The same bytes under other paths need no flag."""
    folder = copy_of_place(place, tmp_path)
    arguments = (str(folder / "machine.json"), str(folder / "run.toml"), [*BASE, *moved(folder)])
    assert run_distributed(train_here, 1, *arguments) == [0]
    fields = [change["field"] for change in json.loads((folder / "run/settings.json").read_text())["changes"]]
    assert fields == ["run.dir", "data.sources[0].prefix", "evaluation.prefixes"]


@pytest.mark.parametrize(("seed", "wanted"), [(0, ["data.sources[0].content"]),
                                              (9, ["data.sources[0].content", "data.tokenizer"])])
def test_other_data_under_the_old_name_are_found(place, tmp_path, seed, wanted):
    """Tokenised again from other text, or with another tokenizer: no flag helps, a branch neither."""
    folder = copy_of_place(place, tmp_path)
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    tokenizer = write_tokenizer(folder / "data/tokenizer", seed=seed)
    write_dataset(folder / "data/train", tokenizer, documents(150, seed=5))
    write_dataset(folder / "data/held", tokenizer, documents(12, seed=2))
    for start in ([], [f"run.start_from={folder}/run", f"run.dir={folder}/branch"]):
        chosen = [o for o in moved(folder) if not start or not o.startswith("run.dir")] + start
        with pytest.raises(ConfigError) as error:
            RunFolder(settings(folder, *chosen, allow=("optimizer", "train"))).starting_point()
        found = [fault for fault in error.value.faults if "data.sources[0].prefix" not in fault]
        assert [any(f"{field}: " in fault for fault in found) for field in wanted] == [True] * len(wanted), found
        assert len(found) == len(wanted) and "--allow-change" not in str(error.value)


@pytest.mark.parametrize("version", [1, 2])
def test_a_golden_checkpoint_goes_on(place, tmp_path, version):
    """Of a release that kept neither profile nor content; with its own settings, and with a confirmed change."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / f"version{version}", run / "checkpoints")
    record = json.loads((run / "checkpoints/step-00000003/record.json").read_text())
    del record["run"]["log"], record["run"]["optimizer"]["decay_norms"], record["run"]["train"]["tokens"]
    (run / "settings.json").write_text(json.dumps({"run": record["run"]}))
    del record["run"]["schedule"]["decay_shape"]
    tables = {"run": {"dir": str(run), "seed": 1}, "data": {"sources": [{"prefix": "data/none"}]},
              **{name: {key: value for key, value in record["run"][name].items() if value is not None}
                 for name in ("model", "train", "optimizer", "schedule", "checkpoint", "energy")}}
    text = "\n".join([f"[{name}]\n" + "\n".join(f"{key} = {inline(value)}" for key, value in table.items())
                      for name, table in tables.items()])
    (tmp_path / "r.toml").write_text(text)
    for overrides, allow in (([], ()), (["optimizer.lr=2e-3"], ("optimizer.lr",))):
        loaded = load_settings(place / "machine.json", tmp_path / "r.toml", [*overrides, "train.steps=10"], allow)
        checkpoint, warnings = RunFolder(loaded).starting_point()
        assert (checkpoint.step, warnings) == (3, [])
    with pytest.raises(ConfigError, match="optimizer.lr: was 0.001"):
        RunFolder(load_settings(place / "machine.json", tmp_path / "r.toml", ["optimizer.lr=2e-3"])).starting_point()


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_an_older_settings_file_tells_the_precision(place, tmp_path):
    """It had what DeepSpeed was given: enough to see bf16 come, and not to call an unknown layout changed."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    stored = json.loads((run / "settings.json").read_text())
    for name in ("profile", "changes"):
        del stored[name]
    (run / "settings.json").write_text(json.dumps(stored))
    profile = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
               "parallel": {"tensor": 2}, "recompute": "full"}
    (tmp_path / "m.json").write_text(json.dumps(profile))
    said = starting_point_alone(load_settings(tmp_path / "m.json", place / "run.toml", [*BASE, f"run.dir={run}"]))
    assert re.findall(r"^  (\S+) .*?  (\S+(?: \S+)*)$", said[0], re.MULTILINE)[1:] == [
        ("run.dir", "allowed"), ("train_micro_batch_size_per_gpu", "allowed"), ("bf16.enabled", "to be confirmed")]
    assert len(said[1]) == 1 and f"{tmp_path}/m.json: bf16.enabled: was false" in said[1][0]
    (tmp_path / "m.json").write_text(json.dumps({**profile, "bf16": None, "fp16": {"enabled": True}}))
    _, faults = starting_point_alone(load_settings(tmp_path / "m.json", place / "run.toml", [*BASE, f"run.dir={run}"]))
    assert len(faults) == 1 and f"{tmp_path}/m.json: fp16.enabled: was false" in faults[0]


def starting_point_alone(loaded):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            RunFolder(loaded).starting_point()
        except ConfigError as error:
            return said.getvalue(), error.faults
    return said.getvalue(), []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": 3}', '{"run": null}', '{"run"'])
def test_settings_that_say_nothing_are_refused(place, tmp_path, text):
    """Checkpoints that nobody can explain are not gone on with."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    (run / "settings.json").write_text(text)
    with pytest.raises(CheckpointError, match="settings.json: the settings of the run cannot be read"):
        RunFolder(settings(place, f"run.dir={run}")).starting_point()

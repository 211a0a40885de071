"""What --dry-run finds before a device is touched: keys in the wrong place, sums that do not add up, broken files."""

from __future__ import annotations

import copy
import json
import re
import resource
import subprocess
import sys
import time
import tomllib
from collections import defaultdict

import pytest
from patience import processor
from test_refusals import BAD_PROFILES, PROFILE, RUN
from test_slips import as_toml, slips

from megatron_ttl.config.deepspeed import DeepSpeedProfile
from megatron_ttl.config.describe import leaf_keys
from megatron_ttl.config.load import load_settings
from megatron_ttl.config.schema import RunFile
from megatron_ttl.errors import ConfigError
from megatron_ttl.plan.forecast import dry_run, forecast

FULL_RUN = tomllib.loads(RUN) | {"evaluation": {"prefixes": ["data/h"], "every_steps": 5, "max_tokens": 640,
                                                "samples": ["Era uma vez"], "sample_tokens": 16,
                                                "tasks": ["agreement_pt"], "task_items": 8},
                                 "log": {"every_steps": 5, "wandb": "offline", "wandb_project": "p"}}
FULL_RUN["run"] |= {"seed": 3, "start_from": "runs/y"}
FULL_RUN["model"] |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "init": "normal"}
FULL_RUN["train"] |= {"gradient_clipping": 1.0}
FULL_RUN["optimizer"] |= {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "decay_norms": False,
                          "decay_embeddings": True}
FULL_RUN["schedule"] |= {"kind": "wsd", "decay_steps": 10, "decay_shape": "linear", "min_lr": 0.0}
FULL_RUN["checkpoint"] |= {"keep_last": 2, "keep_every_steps": 20}
FULL_RUN["energy"] |= {"enabled": True, "measure_power_s": 10.0}
FULL_PROFILE = {
    "train_micro_batch_size_per_gpu": 2, "recompute": "none", "wall_clock_breakdown": False,
    "communication_data_type": "fp32", "bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"},
    "fp16": {"enabled": False, "initial_scale_power": 16, "loss_scale_window": 9, "hysteresis": 2,
             "min_loss_scale": 1.0},
    "parallel": {"tensor": 1, "pipeline": 1, "sequence": False, "replica_check_steps": 9},
    "zero_optimization": {"stage": 1, "overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True,
                          "reduce_bucket_size": 9, "allgather_bucket_size": 9, "stage3_prefetch_bucket_size": 9,
                          "stage3_param_persistence_threshold": 9, "stage3_max_live_parameters": 9,
                          "offload_optimizer": {"device": "cpu", "pin_memory": False}}}


def write(folder, run, profile):
    files = folder / "m.json", folder / "r.toml"
    files[0].write_text(profile if isinstance(profile, str) else json.dumps(profile), encoding="utf-8")
    files[1].write_text(run if isinstance(run, str) else as_toml(run), encoding="utf-8")
    return files


def faults_of(folder, run=RUN, profile=PROFILE, overrides=(), world_size=1):
    """Return what a dry run refuses; that there is no such data is left out."""
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        dry_run(*write(folder, run, profile), list(overrides), world_size)
    assert time.process_time() - began < processor(5)
    return [fault for fault in error.value.faults if not re.search(r"\.(bin|idx): does not exist", fault)]


def test_the_full_files_are_right(tmp_path):
    """What the next tests spoil one key at a time has every key but those that exclude another."""
    load_settings(*write(tmp_path, FULL_RUN, FULL_PROFILE))
    given = {f"{section}.{key}" for section, table in FULL_RUN.items() for key in table}
    assert set(leaf_keys(RunFile)) - given <= {"train.tokens", "schedule.warmup_tokens", "schedule.decay_tokens",
                                               "checkpoint.asynchronous", "train.skip_steps", "log.spike_sigmas",
                                               "data.stages", "data.packing", "data.document_mask",
                                               "train.max_nonfinite_steps", "log.tensorboard"}


def table_of(tables, section):
    for name in section.split(".") if section else ():
        tables = tables.setdefault(name, {})
    return tables


def sections_of(tables, prefix=""):
    """Yield the dotted names of the tables; '' is the top."""
    yield prefix.rstrip(".")
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from sections_of(value, f"{prefix}{name}.")


def spoiled(tables):
    """Yield (kind, key that was meant, tables): one key moved elsewhere, one section or list element misspelt."""
    sections = list(sections_of(tables))
    for section in sections:
        for name, value in table_of(tables, section).items():
            key = f"{section}.{name}" if section else name
            for other in sections:
                if other == section or other.startswith(key) or name in table_of(tables, other) or (
                        isinstance(value, dict) and not other):
                    continue
                changed = copy.deepcopy(tables)
                table_of(changed, other)[name] = table_of(changed, section).pop(name)
                yield "moved", key, changed
            if isinstance(value, dict):
                for kind, slip in {row for row in slips(name) if row[1] != name}:
                    changed = copy.deepcopy(tables)
                    table_of(changed, section)[slip] = table_of(changed, section).pop(name)
                    yield f"section, {kind}", key, changed
            for inner in value[0] if isinstance(value, list) and isinstance(value[0], dict) else ():
                for kind, slip in {row for row in slips(inner) if row[1] != inner}:
                    changed = copy.deepcopy(tables)
                    element = table_of(changed, section)[name][0]
                    element[slip] = element.pop(inner)
                    yield f"list, {kind}", f"{key}[].{inner}", changed


@pytest.mark.parametrize(("model", "every"), [
    (RunFile, 5), (DeepSpeedProfile, 5),
    *(pytest.param(model, 1, marks=pytest.mark.long) for model in (RunFile, DeepSpeedProfile))])
def test_a_key_that_was_moved_or_a_section_misspelt_is_led_home(tmp_path, model, every):
    """One at a time, with its own value: all refused, the right place named in 95 of 100 of each kind."""
    right, total, silent, missed = defaultdict(int), defaultdict(int), [], []
    cases = sorted(spoiled(FULL_RUN if model is RunFile else FULL_PROFILE), key=lambda case: case[:2])
    for kind, key, tables in cases[::every]:
        files = write(tmp_path, *((tables, PROFILE) if model is RunFile else (RUN, tables)))
        total[kind] += 1
        try:
            load_settings(*files)
            silent.append((kind, key))
        except ConfigError as error:
            told = any(f"'{key}'" in fault or f"as {key};" in fault for fault in error.faults)
            right[kind] += told
            missed += [] if told else [(kind, key, error.faults)]
    assert not silent
    assert all(right[kind] >= 0.95 * total[kind] for kind in total), (dict(right), dict(total), missed[:3])
    assert len(cases) > (600 if model is RunFile else 200), len(cases)


MICRO, STAGE, PARALLEL = "train_micro_batch_size_per_gpu", "zero_optimization", "parallel"
SUMS = [  # overrides, change of the profile, processes, what is said
    (["model.hidden_size=66"], {}, 1, "66 over 4 heads leaves 2 channels; .*set it to 64 or 68"),
    (["model.num_attention_heads=5"], {}, 1, "64 over 5 heads leaves 4 channels; .*set it to 60 or 65"),
    (["model.num_attention_heads=64"], {}, 1, "64 / 64 = 1 channels; .*must be even"),
    (["model.num_key_value_heads=3"], {}, 1, "4 query heads cannot share 3; .*one of 1, 2, 4$"),
    (["model.num_key_value_heads=8"], {}, 1, "4 query heads cannot share 8; .*one of 1, 2, 4$"),
    (["train.sequence_length=256"], {}, 1, "is 256, model.max_position_embeddings 128"),
    (["model.max_position_embeddings=32"], {}, 1, "is 64, model.max_position_embeddings 32"),
    (["train.tokens_per_step=500"], {}, 1, "500 is not a multiple of sequence_length 64; .*448 or 512"),
    (["train.tokens_per_step=32"], {}, 1, "32 is not a multiple of sequence_length 64; .*set it to 64$"),
    ([], {}, 3, "2 micro batch x 64 sequence x 3 data-parallel = 384 tokens do not divide .*512; .*384 or 768"),
    ([], {MICRO: 3}, 1,
     "3 micro batch x 64 sequence x 1 data-parallel = 192 tokens .*512; .*_gpu to 2 or 4, .*384 or 576"),
    ([], {MICRO: 16}, 1, "= 1,024 tokens do not divide .*512; .*_gpu to 8 or 4|_gpu to 4 or 8"),
    ([], {MICRO: 1}, 16, "1 micro batch x 64 sequence x 16 data-parallel = 1,024 .*that divides 8 samples"),
    ([], {MICRO: 2**70}, 1, "tokens do not divide tokens_per_step 512; .*_gpu to 4 or 8"),
    (["train.tokens_per_step=1099511627712", "train.steps=9000000"], {MICRO: 5}, 1, "= 320 tokens do not divide"),
    ([], {PARALLEL: {"tensor": 3}}, 3, "is 3, and the model has 4 query heads and 2 key/value heads .*set it to 2$"),
    ([], {PARALLEL: {"tensor": 4}}, 4, "is 4, and the model has 2 key/value heads; .*set it to 2$"),
    (["model.vocab_size=512", "model.intermediate_size=127"], {PARALLEL: {"tensor": 2}}, 2,
     "127 channels .*set it to 1$"),
    ([], {PARALLEL: {"pipeline": 4}}, 4, "is 4, and the model has 2 blocks; .*at most 3"),
    ([], {PARALLEL: {"tensor": 2, "pipeline": 2}}, 6,
     "tensor 2 x pipeline 2 = 4 processes .* there are 6; .*4 or 8 processes"),
    ([], {PARALLEL: {"tensor": 2}}, 1, "tensor 2 x pipeline 1 = 2 processes .* there are 1; .*start 2 processes"),
    ([], {PARALLEL: {"sequence": True}}, 1, "is true with tensor 1; must be false"),
    (["train.sequence_length=63", "train.tokens_per_step=504"], {PARALLEL: {"tensor": 2, "sequence": True}}, 2,
     "train.sequence_length 63 over 2 ranks leaves 1 tokens; .*tensor to 1"),
    ([], {PARALLEL: {"pipeline": 2}, STAGE: {"stage": 3}}, 2, "is 3 with parallel.pipeline 2; must be 0 or 1"),
    ([], {PARALLEL: {"replica_check_steps": 0}}, 1, "replica_check_steps: is 0; must be a whole number > 0"),
    ([], {}, 0, "--world-size: is 0; must be a whole number > 0 and <= 262,144"),
    ([], {}, 2**30, "--world-size: is 1,073,741,824; must be"),
    (["train.tokens=51200"], {}, 1, "train.steps: is 100, and train.tokens is 51,200; only one"),
    (["train.steps=none"], {}, 1, "train.steps: is missing, and so is train.tokens; exactly one"),
    (["train.steps=none", "train.tokens=51300"], {}, 1,
     "51,300 is not a multiple of tokens_per_step 512; .*51,200 or 51,712"),
    (["schedule.warmup_steps=100"], {}, 1, "is 100 steps, and the run has 100; must be shorter"),
    (["schedule.warmup_steps=1000"], {}, 1, "is 1,000 steps, and the run has 100"),
    (["schedule.warmup_tokens=5120"], {}, 1, "is 10, and schedule.warmup_tokens is 5,120; only one"),
    (["schedule.warmup_steps=none", "schedule.warmup_tokens=5000"], {}, 1, "5,000 is not a multiple .*4,608 or 5,120"),
    (["schedule.kind=wsd"], {}, 1, "schedule.decay_steps: is missing, and so is schedule.decay_tokens"),
    (["schedule.kind=wsd", "schedule.decay_steps=95"], {}, 1,
     "10 and decay of 95 steps are 105, and the run has 100; .*at most 90"),
    (["schedule.kind=wsd", "schedule.decay_tokens=1000"], {}, 1,
     "1,000 is not a multiple of tokens_per_step 512; .*512 or 1,024"),
    (["schedule.decay_steps=10"], {}, 1, 'is given, and schedule.kind is "cosine"'),
    (["schedule.decay_shape=sqrt"], {}, 1, 'is given, and schedule.kind is "cosine"'),
    (["schedule.min_lr=1e-2"], {}, 1, "is 0.01, optimizer.lr is 0.001; must be lower.*e.g. to 0.0001"),
    (["schedule.kind=constant", "schedule.min_lr=1e-4"], {}, 1, 'is 0.0001, and schedule.kind is "constant"'),
    (["optimizer.betas=[0.9, 1.0]"], {}, 1, r"is \[0.9, 1.0\]; both must be in \[0, 1\)"),
    (["optimizer.betas=[-0.1, 0.9]"], {}, 1, r"both must be in \[0, 1\)"),
    (["optimizer.betas=[0.9, 0.95, 0.99]"], {}, 1, "must be a list of 2 numbers"),
    (["optimizer.lr=-1e-3"], {}, 1, "optimizer.lr: is -0.001; must be a number > 0 and < 1"),
    (["optimizer.lr=2.0"], {}, 1, "optimizer.lr: is 2.0; must be a number > 0 and < 1"),
    (["optimizer.lr=1e400"], {}, 1, "optimizer.lr: is inf; must be a finite number"),
    (["optimizer.lr=nan"], {}, 1, "optimizer.lr: is nan; must be a finite number"),
    (["optimizer.lr=fast"], {}, 1, 'optimizer.lr: is "fast"; must be a number > 0 and < 1'),
    (["optimizer.eps=1e-300"], {}, 1, "optimizer.eps: is 1e-300; must be a number >= 1e-38"),
    (["model.rms_norm_eps=10.0"], {}, 1, "rms_norm_eps: is 10.0; must be a number >= 1e-38 and < 1"),
    (["train.gradient_clipping=-1"], {}, 1, "gradient_clipping: is -1; must be a number >= 0"),
    (["model.num_hidden_layers=1000000000"], {}, 1, "is 1,000,000,000; must be a whole number > 0 and <= 512"),
    ([f"model.hidden_size={2**70}"], {}, 1, "hidden_size: is 1,180,591,620,717,411,303,424; must be .* <= 16,777,216"),
    ([f"train.tokens_per_step={2**70}"], {}, 1,
     r"tokens_per_step: is 1,180.*; must be a whole number > 0 and <= 2\^40"),
    ([f"train.steps={2**63 - 1}"], {}, 1, r"makes 4.7e\+21 tokens; must be fewer than 2\^63"),
    ([f"run.seed={2**63}"], {}, 1, r"must be a whole number >= 0 and < 2\^63"),
    (["energy.measure_power_s=1e9"], {}, 1, "measure_power_s: is 1000000000.0; must be a number > 0 and <= 86,400"),
    ([], {STAGE: {"stage": 1, "reduce_bucket_size": 2**70}}, 1, r"reduce_bucket_size: is 1,180.*<= 2\^40"),
    (["evaluation.every_steps=5"], {}, 1, "is 5 without prefixes"),
    (['evaluation.prefixes=["data/h"]'], {}, 1, "every_steps: is missing, and evaluation.prefixes is given"),
    (['evaluation.tasks=["cloze_pt"]'], {}, 1, "every_steps: is missing, and evaluation.tasks is given; must say how often"),
    (["evaluation.task_items=8"], {}, 1, "task_items: is 8 without tasks; there must be a task to limit"),
    (['evaluation.samples=["A"]', "evaluation.every_steps=5", "evaluation.sample_tokens=64"], {}, 1,
     "sample_tokens: is 64, train.sequence_length 64; must leave room for a prompt"),
    (['evaluation.samples=["A", "B", "A"]', "evaluation.every_steps=5", "evaluation.sample_tokens=8"], {}, 1,
     r'samples\[2\]: "A" is there twice; each must be named once'),
    (["evaluation.max_tokens=100"], {}, 1, "is 100 without prefixes"),
    (['evaluation.prefixes=["h"]', "evaluation.every_steps=5", "evaluation.max_tokens=10"], {}, 1,
     "is 10, train.sequence_length 64; must hold at least one sample"),
    (['evaluation.prefixes=["data/./pt"]', "evaluation.every_steps=5"], {}, 1, '"data/./pt" is also in data.sources'),
    (['data.sources=[{prefix="a"}, {prefix="b"}, {prefix="./a"}]'], {}, 1,
     r"sources\[2\].prefix: .* already data.sources\[0\]"),
    (["checkpoint.keep_every_steps=15"], {}, 1, "15 is not a multiple of every_steps 10; .*10 or 20"),
    (["energy.country_iso_code=none"], {}, 1, "country_iso_code: is missing; .*ISO 3166"),
    (["energy.country_iso_code=XXX"], {}, 1, "'XXX' is not in codecarbon's table"),
    (["run.start_from=runs/x/checkpoints"], {}, 1, "lies in run.dir"),
    (["model.tie_word_embeddings=true"], {}, 1, "tie_word_embeddings: is true; must be false"),
    ([], {"bf16": {"enabled": True}, STAGE: {"stage": 0}}, 1, "is 0 with bf16; must be 1, 2 or 3"),
    ([], {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, 1, "fp16.enabled: is true, and so is bf16.enabled"),
    ([], {"communication_data_type": "bf16"}, 1, 'is "bf16" in an fp32 run; must be "fp32"'),
    ([], {STAGE: {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, 1, "with stage 0; needs stage 1, 2 or 3"),
]


@pytest.mark.parametrize(("overrides", "profile", "world_size", "message"), SUMS, ids=range(len(SUMS)))
def test_a_sum_that_does_not_add_up_is_shown(tmp_path, overrides, profile, world_size, message):
    """More than sixty: the equation, its numbers, and what is near."""
    faults = faults_of(tmp_path, profile={**PROFILE, **profile}, overrides=overrides, world_size=world_size)
    assert any(re.search(message, fault) for fault in faults), faults
    assert all(fault.count(";") >= 2 and "\n" not in fault for fault in faults), faults
    assert len(SUMS) >= 60


@pytest.mark.parametrize("change", BAD_PROFILES, ids=lambda change: json.dumps(change)[:50])
def test_what_deepspeed_takes_without_a_word_is_refused(tmp_path, change):
    assert faults_of(tmp_path, profile={**PROFILE, **change}) and len(BAD_PROFILES) >= 22


GOOD = json.dumps(PROFILE)


@pytest.mark.parametrize(("profile", "message"), [
    ('{"train_micro_batch_size_per_gpu": 2, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}',
     'm.json:1:39: is the key "train_micro_batch_size_per_gpu" again'),
    (GOOD.replace("2", "NaN"), "is NaN; JSON knows finite numbers only"),
    (GOOD.replace("2", "-Infinity"), "is -Infinity; JSON knows"),
    (GOOD.replace("2", "1e400"), "train_micro_batch_size_per_gpu: is inf; must be a finite number"),
    (GOOD.replace('"stage": 1', f'"stage": {2**70}'),
     "zero_optimization.stage: is 1,180,591,620,717,411,303,424; must be"),
    (GOOD.replace("2", '"2"'), "write it without quotes"),
    (GOOD.replace("2", "2.0"), "is 2.0; must be a whole number > 0; write 2"),
    (GOOD.replace("2", "true"), "is true; must be a whole number"),
    (GOOD.replace("2", "null"), "must be a whole number"),
    (GOOD.replace("2", "[2]"), "must be a whole number"), (GOOD.replace("2", "{}"), "must be a whole number"),
    (GOOD.replace('{"stage": 1}', "[]"), "must be a table"),
    ("// note\n" + GOOD, "m.json:1:1: is a comment"), (GOOD.replace("2,", "2, /* x */"), "is a comment"),
    (GOOD[:-1] + ",}", "is a comma before a closing bracket"), ("", "m.json: is empty"), ("\ufeff", "m.json: is empty"),
    ("[1, 2]", "it must hold one JSON object"), ('"text"', "it must hold one JSON object"), (GOOD + GOOD, "Extra data"),
    (GOOD[:-3], "m.json:1:"), ("{'a': 1}", "m.json:1:2"), ("[" * 100_000, "m.json: .*recursion"),
])
def test_a_json_file_of_any_kind(tmp_path, profile, message):
    faults = faults_of(tmp_path, profile=profile)
    assert any(re.search(message, fault) for fault in faults) and all(fault.count(";") >= 2 for fault in faults), faults


@pytest.mark.parametrize(("run", "message"), [
    (RUN + "\n[run]\n", r"r.toml:\d+:\d+: Cannot declare"), (RUN.replace("lr =", "lr = 1\nlr ="), "Cannot overwrite"),
    (RUN.replace("lr = 1e-3", "lr = nan"), "optimizer.lr: is nan; must be a finite number"),
    (RUN.replace("lr = 1e-3", "lr = -inf"), "optimizer.lr: is -inf; must be a finite number"),
    (RUN.replace("lr = 1e-3", "lr = 1e400"), "optimizer.lr: is inf; must be a finite number"),
    (RUN.replace("steps = 100", f"steps = {2**70}"), "train.steps: makes .* tokens; must be fewer"),
    (RUN.replace("steps = 100", 'steps = "100"'), "write it without quotes"),
    (RUN.replace("steps = 100", "steps = 1e2"), "is 100.0; must be a whole number > 0; write 100"),
    (RUN.replace("steps = 100", "steps = []"), "must be a whole number"),
    (RUN.replace("steps = 100", "steps = 2026-01-01"), "is a date or time"),
    (RUN.replace("lr = 1e-3", "lr = 1e-3 // peak"), r"r.toml:\d+:\d+: "),
    (RUN.replace("lr = 1e-3", "lr = 1e-3,"), r"r.toml:\d+"),
    (RUN.replace("lr = 1e-3", "lr = ."), r"r.toml:\d+:\d+: Invalid value"), ("", "r.toml: is empty"),
    ("\ufeff", "r.toml: is empty"),
    ("[[run]]\ndir = 'x'", "run: is .*; must be a table"), (json.dumps(tomllib.loads(RUN)), "r.toml:1:1: "),
    ("a = " + "[" * 100_000, "r.toml: .*recursion"), ("[run]\ndir = 'x'\0", "r.toml:2"),
])
def test_a_toml_file_of_any_kind(tmp_path, run, message):
    faults = faults_of(tmp_path, run=run)
    assert any(re.search(message, fault) for fault in faults) and all(fault.count(";") >= 2 for fault in faults), faults


def test_a_byte_order_mark_is_no_fault(tmp_path):
    """Windows editors write one."""
    load_settings(*write(tmp_path, "\ufeff" + RUN, "\ufeff" + GOOD))


def test_the_command_finds_them_quickly_and_without_torch(repository, tmp_path):
    """The real --dry-run: both files, overrides and data in one list, status 2; no torch, no DeepSpeed."""
    profile = {**PROFILE, "gradient_cliping": 1.0, "parallel": {"tensor": 3}}
    files = write(tmp_path, RUN.replace("lr = 1e-3", "lr = 3.0"), profile)
    script = ("import sys; sys.argv = ['pretrain_ttl.py', *sys.argv[1:]]\n"
              "import pretrain_ttl, megatron_ttl.console as c\n"
              "try: c.run_tool(pretrain_ttl.main)\n"
              "finally: print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", script, "--deepspeed_config", str(files[0]), "--config", str(files[1]),
                           "--dry-run", "model.num_attention_heads=7", "--allow-change", "optimizer.lrr"],
                          cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "[]\n", (done.stdout, done.stderr)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
    for part in ("did you mean 'gradient_clipping'", "parallel.tensor: is 3", "optimizer.lr: is 3.0", "64 over 7 heads",
                 "pt.bin: does not exist", "--allow-change optimizer.lrr: is no setting"):
        assert part in done.stderr, part


def test_help_of_every_command_needs_no_torch(repository):
    """pretrain_ttl.py and all tools, one after the other in one interpreter."""
    script = ("import runpy, sys\n"
              "for path in sys.argv[1:]:\n"
              "    sys.argv = [path, '--help']\n"
              "    try: runpy.run_path(path, run_name='__main__')\n"
              "    except SystemExit as end: assert end.code in (0, None), path\n"
              "    print('loaded:', path, sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))")
    commands = ["pretrain_ttl.py", *sorted(f"tools/{path.name}" for path in (repository / "tools").glob("*.py"))]
    done = subprocess.run([sys.executable, "-c", script, *commands], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert loaded == [f"loaded: {command} []" for command in commands]
    assert "--allow-change KEY" in done.stdout


@pytest.mark.parametrize(("blocks", "stages", "processes"), [
    (512, 513, 513), pytest.param(2, 1, 2**18, marks=pytest.mark.long)])
def test_the_largest_plans_are_quick_too(tmp_path, blocks, stages, processes):
    """As many stages or processes as the settings may ask for: a plan, and no hang."""
    files = write(tmp_path, RUN, {**PROFILE, "parallel": {"pipeline": stages}})
    began = time.process_time()
    loaded = load_settings(*files, [f"model.num_hidden_layers={blocks}", f"train.tokens_per_step={processes * 128}"])
    plan = forecast(loaded, processes)
    assert len(plan["layout"]["stages"]) == stages and time.process_time() - began < processor(5)

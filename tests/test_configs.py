"""The shipped presets: their napkin numbers, their learning rates, the papers' hyper-parameters."""

from __future__ import annotations

import json
import re

import pytest

from megatron_ttl.config.checks import accumulation
from megatron_ttl.config.load import load_settings, read_settings
from megatron_ttl.model.flops import BYTES_PER_PARAMETER, count_parameters, flops_per_token
from megatron_ttl.plan.layout_costs import bubble, layout_for, stage_costs
from megatron_ttl.train.schedule import Schedule

PROFILES = ("a100_single", "h100_single", "cpu", "a100_8x", "h100_8x", "slurm_2x8", "cpu_tp2_pp2", "small_gpu_offload",
            "v100_fp16")
PRESETS = ("ttl_160m", "ttl_460m", "tinyllama_1b1")
PUBLISHED = {
    # layers, hidden, intermediate, heads, kv heads, eps; tokens per step, steps, clip; lr, betas, decay;
    # warm-up, min lr
    "ttl_160m": ((12, 768, 3072, 12, 12, 1e-6), (8_192, 458_000, 0.0), (6e-4, (0.9, 0.999), 0.01), (5_000, 0.0)),
    "ttl_460m": ((24, 1024, 4096, 16, 16, 1e-6), (8_192, 1_200_000, 0.0), (3e-4, (0.9, 0.999), 0.01), (10_000, 0.0)),
    "tinyllama_1b1": ((22, 2048, 5632, 32, 4, 1e-5), (2_097_152, 1_430_512, 1.0), (4e-4, (0.9, 0.95), 0.1),
                      (2_000, 4e-5)),
}
LEARNING_RATES = {
    "ttl_160m": {2_500: 3e-4, 5_000: 6e-4, 231_500: 3e-4, 458_000: 0},
    "ttl_460m": {5_000: 1.5e-4, 10_000: 3e-4, 605_000: 1.5e-4, 1_200_000: 0},
    "tinyllama_1b1": {2_000: 4e-4, 716_256: 2.2e-4, 1_430_512: 4e-5},
}


def settings(repository, name, profile="a100_single"):
    return load_settings(repository / f"configs/{profile}.json", repository / f"configs/{name}.toml")


def header(repository, name):
    text = (repository / f"configs/{name}.toml").read_text()
    numbers = re.findall(r"^# +([A-Za-z0-9/ ]+?) {2,}([\d.,e+]+) ", text.replace("\n", " \n"), re.MULTILINE)
    return {key: float(value.replace(",", "")) for key, value in numbers}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("profile", ["a100_single", "h100_single", "cpu"])
def test_presets_are_the_real_runs(repository, name, profile):
    """Shapes, batches, optimizers and schedules of both papers."""
    run = settings(repository, name, profile if name != "ttl_160m" or profile != "cpu" else "a100_single").run
    shape, length, optimizer, schedule = PUBLISHED[name]
    model = run.model
    assert (model.num_hidden_layers, model.hidden_size, model.intermediate_size, model.num_attention_heads,
            model.num_key_value_heads, model.rms_norm_eps) == shape
    assert (model.vocab_size, model.max_position_embeddings, run.train.sequence_length) == (32_000, 2_048, 2_048)
    assert (run.train.tokens_per_step, run.total_steps, run.train.gradient_clipping) == length
    assert (run.optimizer.lr, run.optimizer.betas, run.optimizer.weight_decay) == optimizer
    assert (run.warmup_steps, run.schedule.min_lr) == schedule
    assert model.init == ("tinyllama" if name == "tinyllama_1b1" else "normal")
    assert not run.optimizer.decay_norms and run.optimizer.decay_embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_learning_rates_at_the_listed_steps(repository, name):
    """The schedule that the preset builds, not a copy of its numbers."""
    schedule = Schedule.of(settings(repository, name).run)
    for step, lr in LEARNING_RATES[name].items():
        assert schedule.at(step) == pytest.approx(lr, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", PRESETS)
def test_napkin_numbers_are_right(repository, name):
    """Every number of the header, recomputed."""
    run, napkin = settings(repository, name).run, header(repository, name)
    parameters, per_token = count_parameters(run.model), flops_per_token(run.model, 2_048, "C")
    tokens = run.total_steps * run.train.tokens_per_step
    hours = tokens * per_token / (0.4 * 312e12) / 3600
    expected = {"parameters": parameters, "tokens": tokens, "FLOPs/token": per_token, "FLOPs": tokens * per_token,
                "A100 hours": hours, "A100 kWh": hours * 0.4, "checkpoint": BYTES_PER_PARAMETER * parameters / 1e9}
    assert napkin.keys() == expected.keys()
    for key, value in expected.items():
        assert napkin[key] == pytest.approx(value, rel=6e-3), key


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_small_run_files_count_their_parameters(repository, name):
    """The two CPU runs."""
    run, napkin = settings(repository, name, "cpu").run, header(repository, name)
    assert napkin["parameters"] == count_parameters(run.model)


def layout_table(repository):
    """Yield the rows of the README's table of layouts."""
    text = (repository / "configs/README.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `") and line.count("|") == 8]
    for profile, _, processes, run, layout, states, sent in rows:
        name, tokens = run.strip().split(", ", 1)
        yield (profile.strip(" `"), int(processes), name.strip("`"), int(tokens.replace(",", "")), layout.strip(),
               float(states), float(sent))


def test_the_table_of_layouts_is_right(repository):
    """Every figure, recomputed; and no profile without a row but cpu.json."""
    named = set()
    for profile, processes, name, tokens, layout, states, sent in layout_table(repository):
        files = repository / "configs" / profile, repository / "configs" / name
        loaded = load_settings(*files, [f"train.tokens_per_step={tokens}"])
        assert read_settings(*files, [f"train.tokens_per_step={tokens}"], processes).faults == []
        cut = layout_for(loaded, processes)
        degrees = {"tensor": cut.tensor, "pipeline": cut.pipeline, "data": cut.data}
        words = [f"{axis} {size}" for axis, size in degrees.items() if size > 1] or ["no cut"]
        assert all(word in layout for word in words) and ("sequence" in layout) == cut.sequence, profile
        first = stage_costs(loaded, cut)[0]
        assert states == pytest.approx(first.device_bytes / 1e9, rel=5e-3, abs=5e-4), profile
        assert sent == pytest.approx(sum(first.sent_bytes.values()) / 1e9, rel=5e-3, abs=5e-4), profile
        assert not first.host_bytes or f"{first.host_bytes / 1e9:.1f} GB on the host" in layout
        named.add(profile)
    assert named == {f"{name}.json" for name in PROFILES if name != "cpu"}


@pytest.mark.parametrize(("parallel", "stage", "link", "gigabytes"), [
    ({}, 1, "data", 9.6), ({"tensor": 2}, 1, "tensor", 193), ({"tensor": 2}, 1, "data", 4.1), ({}, 2, "data", 125),
    ({"pipeline": 2}, 1, "pipeline", 2.1), ({"pipeline": 2}, 1, "data", 4.5),
])
def test_what_the_profiles_say_of_other_layouts(repository, tmp_path, parallel, stage, link, gigabytes):
    """A step of TinyLlama on eight H100, cut otherwise."""
    profile = json.loads((repository / "configs/h100_8x.json").read_text())
    profile |= {"parallel": parallel, "zero_optimization": {"stage": stage}}
    (tmp_path / "m.json").write_text(json.dumps(profile))
    loaded = load_settings(tmp_path / "m.json", repository / "configs/tinyllama_1b1.toml")
    sent = stage_costs(loaded, layout_for(loaded, 8))[0].sent_bytes[link] / 1e9
    assert sent == pytest.approx(gigabytes, rel=0.01, abs=0.05)


def test_pipelines_wait_as_long_as_is_said(repository):
    """Three per cent for TinyLlama in two stages; 11 and 20 per cent on a laptop."""
    for profile, data in (("h100_8x", 4), ("slurm_2x8", 8)):
        micro_batches = accumulation(settings(repository, "tinyllama_1b1", profile), data)
        assert bubble(2, micro_batches) == pytest.approx(0.03, abs=0.005)
    loaded = settings(repository, "debug", "cpu_tp2_pp2")
    waits = [bubble(2, accumulation(loaded, layout_for(loaded, size).data)) for size in (4, 8)]
    assert waits == [pytest.approx(0.111, abs=0.001), pytest.approx(0.2)]


def test_every_profile_says_why_it_is_so(repository):
    """Its first lines are for people, none too long for a screen; keys and values stay DeepSpeed's."""
    for name in PROFILES:
        text = (repository / f"configs/{name}.json").read_text()
        assert json.loads(text)["_comment"] and max(map(len, text.splitlines())) <= 130, name


def test_every_shipped_file_is_loaded_here(repository):
    """No preset without a test."""
    assert {path.stem for path in (repository / "configs").glob("*.toml")} == {*PRESETS, "debug", "demo"}
    assert {path.stem for path in (repository / "configs").glob("*.json")} == set(PROFILES)

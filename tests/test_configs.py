"""The shipped presets: their napkin numbers, their learning rates, the papers' hyper-parameters."""

from __future__ import annotations

import re

import pytest

from megatron_ttl.config.load import load_settings
from megatron_ttl.model.flops import BYTES_PER_PARAMETER, count_parameters, flops_per_token
from megatron_ttl.train.schedule import Schedule

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


def test_every_shipped_file_is_loaded_here(repository):
    """No preset without a test."""
    assert {path.stem for path in (repository / "configs").glob("*.toml")} == {*PRESETS, "debug", "demo"}
    assert {path.stem for path in (repository / "configs").glob("*.json")} == {"a100_single", "h100_single", "cpu"}

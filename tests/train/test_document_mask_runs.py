"""The real loop with packed and masked documents: one curve for all layouts, and that of each document alone."""

from __future__ import annotations

import json

import pytest
import torch
from test_layout_sessions import equal_rows, profile
from test_loop import GENTLE, losses, rows
from tiny_session import PIECES, train_here, write_data, write_settings

from megatron_ttl.config.load import load_settings
from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.cross_entropy import cross_entropy
from megatron_ttl.model.llama import build_model
from megatron_ttl.plan.forecast import dry_run, print_forecast
from megatron_ttl.testing import run_distributed
from megatron_ttl.train.open_data import open_data
from megatron_ttl.train.run_folder import RunFolder

MASK, FIT = "data.document_mask=true", "data.packing=best_fit"
RUNS = {"fit-mask": [FIT, MASK], "mask": [MASK], "fit": [FIT], "plain": []}
LAYOUTS = {  # each on two processes; the run it must repeat
    "tensor": ("fit-mask", profile(parallel={"tensor": 2, "sequence": True}, recompute="selective")),
    "data": ("fit-mask", profile(stage=3, recompute="full")),
    "tensor-mask": ("mask", profile(parallel={"tensor": 2}, stage=2, recompute="full")),
    "pipeline": ("fit", profile(parallel={"pipeline": 2}, stage=0)),
}


def train_all(mesh, deepspeed, run, runs):
    """Train under several settings one after the other; by name, the DeepSpeed JSON and the overrides."""
    return [train_here(mesh, deepspeed.format(name), run, [f"run.dir={run}.runs/{name}", GENTLE, *overrides])
            for name, overrides in runs.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All of RUNS on one process and all of LAYOUTS on two."""
    folder = tmp_path_factory.mktemp("runs")
    one, run = write_settings(folder, write_data(folder / "data"), folder / "unused")
    for name, (_, machine) in LAYOUTS.items():
        (folder / f"{name}.json").write_text(json.dumps(machine))
    assert run_distributed(train_all, 1, str(one), str(run), RUNS) == [[0] * len(RUNS)]
    cut = {name: RUNS[same] for name, (same, _) in LAYOUTS.items()}
    assert run_distributed(train_all, 2, str(folder / "{}.json"), str(run), cut) == [[0] * len(cut)] * 2
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_curve_of_one_process(trained, name):
    """Losses, norms and held-out losses; steps have unequal numbers of labels, and ranks too."""
    equal_rows(trained / f"run.toml.runs/{name}", trained / f"run.toml.runs/{LAYOUTS[name][0]}")


def settings_of(folder, *overrides):
    return load_settings(folder / "machine.json", folder / "run.toml", [GENTLE, *overrides])


@pytest.mark.parametrize("name", ["fit-mask", "mask"])
def test_the_first_loss_is_that_of_each_document_alone(trained, name):
    """The initial model on every document of the first step by itself, as it stands in its sample."""
    run = settings_of(trained, *RUNS[name]).run
    dataset, held_out = open_data(run)
    (measured,) = held_out.values()
    assert dataset.eos_id == measured.eos_id == 2, "held-out text is measured as the model is trained"
    model, nats, count = build_model(run.model, run.run.seed), 0.0, 0
    for ids, labels in zip(*map(torch.from_numpy, dataset.samples(range(run.samples_per_step))), strict=True):
        for piece, wanted in zip(*(part.split(sizes(ids)) for part in (ids, labels)), strict=True):
            if (wanted != -100).any():
                nats += cross_entropy(model(piece[None]), wanted[None]).item()
                count += int((wanted != -100).sum())
    assert count < run.train.tokens_per_step
    assert losses(trained / f"run.toml.runs/{name}")[0][2] == pytest.approx(nats / count, rel=1e-6)


def sizes(ids):
    """Return how long the documents of a sample are, EOS included."""
    ends = (torch.nonzero(ids == 2).flatten() + 1).tolist()
    ends += [len(ids)] * (not ends or ends[-1] < len(ids))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def test_the_four_curves_are_four(trained):
    """Neither setting is ignored, in training or in evaluation; the tokens of a step are counted alike."""
    curves = [losses(trained / f"run.toml.runs/{name}") for name in RUNS]
    assert len({curve[0][2] for curve in curves}) == len({curve[-1][2] for curve in curves}) == 4
    assert all([row[:2] for row in curve] == [(step, 256 * step) for step in range(1, 13)] for curve in curves)
    assert len({json.dumps([row[f"loss/{trained}/data/held"] for row in rows(trained / f"run.toml.runs/{name}",
                                                                              "evaluation")]) for name in RUNS}) == 4


def test_a_resumed_run_keeps_to_them(trained):
    """Another packing never; a mask only when it is confirmed."""
    folder = f"run.dir={trained}/run.toml.runs/fit-mask"
    with pytest.raises(ConfigError, match='data.packing: was "best_fit" .*, is now "concatenate"; must stay') as caught:
        RunFolder(settings_of(trained, folder)).starting_point()
    assert "data.document_mask: was true" in str(caught.value) and "--allow-change data.document_mask" in str(caught.value)
    assert RunFolder(settings_of(trained, folder, FIT, MASK)).starting_point()[0].step == 12


def test_a_dry_run_says_it(trained, capsys):
    """Padding and remainder, counted; a pipeline is refused with the mask before any process starts."""
    files = trained / "machine.json", trained / "run.toml"
    new = f"run.dir={trained}/new"
    result = dry_run(*files, [new, FIT, MASK], 1)
    assert (result["packing"], result["document_mask"], result["remainder_tokens"]) == ("best_fit", True, 0)
    assert 0 < result["padding_share"] < 0.05
    plain = dry_run(*files, [new], 1)
    assert (plain["packing"], plain["padding_share"]) == ("concatenate", 0) and 0 < plain["remainder_tokens"] < 32
    print_forecast(result, as_json=False)
    assert "best_fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="parallel.pipeline: is 2, and .*data.document_mask is true"):
        dry_run(trained / "pipeline.json", files[1], [new, MASK], 2)
    assert PIECES == settings_of(trained).run.model.vocab_size

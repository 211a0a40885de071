"""What a model has read helps where a few labelled rows do not tell all: it beats itself untrained, and the majority."""

from __future__ import annotations

from labelled_files import small_request, write_rows, write_task
from topic_language import labelled, write_reader

from megatron_ttl.finetune.experiment import fine_tune
from megatron_ttl.finetune.results import compare
from megatron_ttl.finetune.training import HyperParameters


def test_a_pretrained_model_beats_itself_untrained_and_the_majority(tmp_path):
    data = write_task(tmp_path / "data")
    write_rows(data / "single.train.jsonl", labelled(60, seed=1, familiar=True))
    write_rows(data / "single.test.jsonl", labelled(100, seed=2, familiar=False))  # not one word of the training rows
    model = write_reader(tmp_path / "reader")
    training = HyperParameters(epochs=5, batch=8, learning_rate=1e-3)
    results = {untrained: fine_tune(small_request(data, model, tmp_path / f"output-{untrained}", seeds=3, training=training,
                                                  untrained=untrained)) for untrained in (False, True)}
    read, unread = (results[untrained]["summary"]["accuracy"] for untrained in (False, True))
    assert results[True]["seeds"][0]["validation"]["accuracy"] > 0.8  # it learns what the rows say
    assert read["mean"] > 0.8
    assert read["mean"] - unread["mean"] > 0.15
    assert read["mean"] > results[False]["baselines"]["majority"]["accuracy"] + 0.3
    vote = compare(tmp_path / "output-False", tmp_path / "output-True")[-1]
    assert vote["only_this_right"] > vote["only_other_right"] and vote["p_value"] < 0.01

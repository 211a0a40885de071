"""Generation against transformers, against the uncached model, and against its own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ttl.errors import UserError
from megatron_ttl.generate import generate as module
from megatron_ttl.generate.generate import (
    continue_prompt,
    encode_prompt,
    generate,
    generate_steps,
    generate_text,
)
from megatron_ttl.generate.sampling import Sampling

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def oracle(model_folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_folder).eval()


@pytest.mark.parametrize("prompt", ["", "a menina viu", "O trem esperou 日本", "o rio. a cidade " * 4])
def test_greedy_text_equals_transformers(opened, oracle, prompt):
    ids = encode_prompt(opened, prompt)
    count = 48 - len(ids)
    found = generate(opened.model, opened.config, ids, count, GREEDY)
    wanted = oracle.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, use_cache=False,
                             eos_token_id=None, pad_token_id=0)
    assert found == [wanted[0, len(ids) :].tolist()]
    assert len(set(found[0])) > 3, "a model that repeats itself shows nothing"


def test_prompt_ids_equal_transformers(opened, model_folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model_folder)
    for prompt in ("", "a menina viu", " o rio", "日本 🙂"):
        assert encode_prompt(opened, prompt) == theirs(prompt)["input_ids"]


def test_without_bos(opened):
    plain = dataclasses.replace(opened, add_bos=False)
    ids = opened.tokenizer.encode("o rio")
    assert encode_prompt(plain, "o rio") == ids
    assert encode_prompt(opened, "o rio") == [opened.tokenizer.bos_id, *ids]
    assert encode_prompt(plain, "") == [opened.tokenizer.bos_id]


def test_sampled_text_is_what_the_uncached_model_gives(opened):
    how = Sampling(0.9, 30, 0.9, seed=4)
    ids = encode_prompt(opened, "a chuva")
    found = generate(opened.model, opened.config, ids, 20, how)[0]
    choose = module.TokenChooser(how)
    for step in range(20):
        with torch.no_grad():
            assert choose(opened.model(torch.tensor([ids]))[:, -1]).tolist() == [found[step]]
        ids = [*ids, found[step]]


def test_seeds(opened):
    ids = encode_prompt(opened, "o menino")

    def run(seed: int, samples: int = 1) -> list[list[int]]:
        how = Sampling(1.0, 0, 1.0, seed)
        return generate(opened.model, opened.config, ids, 16, how, num_samples=samples)

    assert run(1) == run(1)
    assert run(1) != run(2)
    three = run(1, samples=3)
    assert three[:1] == run(1) and three[0] != three[1] != three[2]


def test_the_prompt_is_read_once_for_all_samples(opened, monkeypatch):
    shapes = []
    true = module.cached_logits

    def spy(model, ids, caches):
        shapes.append(tuple(ids.shape))
        return true(model, ids, caches)

    monkeypatch.setattr(module, "cached_logits", spy)
    generate(opened.model, opened.config, [1, 5, 6, 7], 4, Sampling(seed=1), num_samples=3)
    assert shapes == [(1, 4), (3, 1), (3, 1), (3, 1)]


def test_eos_ends_a_sample_and_the_others_go_on(opened, monkeypatch):
    script = iter([[5, 6, 7], [2, 6, 7], [9, 8, 2], [9, 2, 9], [9, 9, 9]])
    monkeypatch.setattr(module.TokenChooser, "__call__", lambda self, logits: torch.tensor(next(script)))
    steps = list(generate_steps(opened.model, opened.config, [1], 10, Sampling(), eos_id=2, num_samples=3))
    assert steps == [[5, 6, 7], [2, 6, 7], [None, 8, 2], [None, 2, None]]


def test_without_eos_nothing_ends_early(opened):
    ids = generate(opened.model, opened.config, [1], 30, Sampling(1e6, 0, 1.0), num_samples=8, vocab_size=3)
    assert [len(sample) for sample in ids] == [30] * 8
    assert {token for sample in ids for token in sample} == {0, 1, 2}


def test_rows_without_a_piece_are_never_chosen(opened):
    class Loud(torch.nn.Module):
        def forward(self, x):
            logits = torch.zeros(*x.shape[:2], 350)
            logits[..., 300:] = 9.0
            return logits

    model = torch.nn.Sequential(*list(opened.model)[:-1], Loud())
    assert generate(model, opened.config, [1], 3, GREEDY, vocab_size=300) == [[0, 0, 0]]
    assert generate(model, opened.config, [1], 3, GREEDY) == [[300, 300, 300]]


def test_training_goes_on_after_generation(opened, tmp_path):
    """Rotary tables made while generating must be of use to autograd."""
    from megatron_ttl.model.llama import build_model

    model = build_model(opened.config, seed=0)
    generate(model, opened.config, [1, 2, 3], 5, GREEDY)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model[0].embed_tokens.weight.grad is not None


@pytest.mark.parametrize(("ids", "count", "message"), [
    ([1] * 20, 29, "20 tokens and 29 new ones are 49; the model has 48 positions; ask for at most 28 new"),
    ([1] * 48, 1, "prompt: 48 tokens and 1 new ones are 49; .*; shorten the prompt to less than 48 tokens"),
    ([1], 0, "max_new_tokens: 0; it must be at least 1"),
    ([], 4, "prompt: no token; it must have at least one"),
    ([1, 350], 4, r"prompt: ids from 1 to 350; they must be in \[0, 350\); tokenize it"),
    ([-1, 3], 4, r"prompt: ids from -1 to 3; they must be in \[0, 350\)"),
])
def test_what_cannot_be_continued_is_refused(opened, ids, count, message):
    # Refused at the call, before the first token is asked for.
    with pytest.raises(UserError, match=message):
        generate_steps(opened.model, opened.config, ids, count, GREEDY)


def test_the_last_position_can_be_reached(opened):
    assert len(generate(opened.model, opened.config, [1] * 20, 28, GREEDY)[0]) == 28


def test_half_a_character_in_the_prompt_is_refused(opened):
    with pytest.raises(UserError, match="prompt: character 1 is half a character; it must be valid UTF-8"):
        encode_prompt(opened, "a\udc80")


def test_shown_text_is_the_prompt_and_the_text(opened):
    shown: list[str] = []
    result = continue_prompt(opened, "a menina", 30, Sampling(1.0, 0, 1.0, seed=3), show=shown.append)
    assert shown[0] == "a menina"
    assert "".join(shown[1:]) == result["samples"][0]["text"] != ""
    assert sum(piece != "" for piece in shown) > 5, "it must come piece by piece"


def test_nothing_is_shown_when_the_prompt_is_refused(opened):
    shown: list[str] = []
    with pytest.raises(UserError, match="the model has 48 positions"):
        continue_prompt(opened, "a menina " * 30, 30, GREEDY, show=shown.append)
    assert shown == []


def test_result_tells_how_it_ended(opened, monkeypatch):
    words = opened.tokenizer.encode(" o rio")
    assert len(words) >= 2
    script = iter([[words[0], words[0]], [words[1], 2], [7, 2], [7, 2]])
    monkeypatch.setattr(module.TokenChooser, "__call__", lambda self, logits: torch.tensor(next(script)))
    result = continue_prompt(opened, "a", 4, Sampling(seed=9), num_samples=2)
    first, second = result["samples"]
    assert (first["new_tokens"], first["ended"]) == (4, "length")
    assert (second["new_tokens"], second["ended"]) == (2, "eos")
    assert second["text"] == opened.tokenizer.decode([words[0]])
    assert result["prompt_tokens"] == len(encode_prompt(opened, "a"))
    assert result["sampling"] == {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "seed": 9}
    assert result["tokens_per_s"] > 0


def test_shown_text_does_not_repeat_before_eos(opened, monkeypatch):
    word = opened.tokenizer.encode("rio")[0]
    script = iter([[word], [2]])
    monkeypatch.setattr(module.TokenChooser, "__call__", lambda self, logits: torch.tensor(next(script)))
    shown: list[str] = []
    continue_prompt(opened, "a", 4, Sampling(), show=shown.append)
    assert "".join(shown) == "a" + opened.tokenizer.decode([word])


def test_generate_text_is_prompt_and_continuation(model_folder, opened):
    text = generate_text(model_folder, "o trem", 12, greedy=True, device="cpu")
    ids = generate(opened.model, opened.config, encode_prompt(opened, "o trem"), 12, GREEDY, eos_id=2)[0]
    assert text == "o trem" + opened.tokenizer.decode(token for token in ids)
    with pytest.raises(UserError) as caught:
        generate_text(model_folder, "o trem", 0, top_p=2.0)
    assert len(caught.value.faults) == 2


def test_bfloat16(model_folder):
    from megatron_ttl.generate.open_folder import open_model_folder

    half = open_model_folder(model_folder, "cpu", "bfloat16")
    result = continue_prompt(half, "a menina", 10, GREEDY)
    assert result["samples"][0]["new_tokens"] >= 1 and result["dtype"] == "bfloat16"
    assert result["sampling"] == {"temperature": 0.0}, "filters have no say when nothing is drawn"

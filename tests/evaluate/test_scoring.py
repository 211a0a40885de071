"""Log-likelihoods with shared beginnings computed once are those of one request after the other."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.errors import CheckpointError
from megatron_ttl.evaluate.scoring import Scorer
from megatron_ttl.evaluate.token_trees import Pair, arrange
from megatron_ttl.model.llama import build_model

CONFIG = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=61, max_position_embeddings=640)


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    """A model whose attention is far from uniform: a token seen or unseen by mistake shows."""
    built = build_model(CONFIG, seed=1)
    for weight in built.parameters():
        weight.data.mul_(10 if weight.dim() == 2 else 1)
    return built


def one_by_one(model: nn.Sequential, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """Run every sequence alone and whole."""
    answers = []
    with torch.no_grad():
        for context, continuation in pairs:
            ids, targets = torch.tensor([*context, *continuation]), torch.tensor(list(continuation))
            shares = model(ids[None, :-1])[0, -len(targets) :].double().log_softmax(-1)
            greedy = bool((shares.argmax(-1) == targets).all())
            answers.append((float(shares.gather(1, targets[:, None]).sum()), greedy))
    return answers


def drawn(draw: random.Random, count: int, ids: int = 61) -> list[int]:
    return [draw.randrange(ids) for _ in range(count)]


def random_pairs(seed: int, questions: int, trunk: int, deeper: int) -> list[Pair]:
    """Draw questions behind a common beginning, of which some share more; contexts that are beginnings of others."""
    draw = random.Random(seed)
    common = drawn(draw, trunk)
    deep = common + drawn(draw, deeper)
    pairs = []
    for _ in range(questions):
        begun = draw.choice((common, deep, deep[: draw.randint(0, len(deep))]))
        context = begun + drawn(draw, draw.choice((1, 4, 60)))
        for _ in range(draw.randint(1, 5)):
            kept = context if draw.random() < 0.8 else context[: draw.randint(1, len(context))]
            # With two ids only, continuations are beginnings of one another, and sometimes equal.
            pairs.append((kept, drawn(draw, draw.choice((1, 1, 2, 9, 40)), draw.choice((2, 61)))))
    draw.shuffle(pairs)
    return pairs


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), questions=st.integers(1, 12), trunk=st.sampled_from((0, 0, 40, 300)),
       deeper=st.sampled_from((0, 50)))
def test_scores_are_those_of_one_by_one(model, seed, questions, trunk, deeper):
    pairs = random_pairs(seed, questions, trunk, deeper)
    expected = one_by_one(model, pairs)
    for batch in (1, 3, 64):
        scores = Scorer(model, CONFIG, batch).score(pairs)
        assert max(abs(a - b) for (a, _), (b, _) in zip(scores, expected, strict=True)) <= 1e-5
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_other_numbers_of_heads(kv_heads):
    config = CONFIG.model_copy(update={"num_key_value_heads": kv_heads})
    built = build_model(config, seed=2)
    pairs = random_pairs(5, 8, 40, 50)
    scores = Scorer(built, config).score(pairs)
    assert [nats for nats, _ in scores] == pytest.approx([nats for nats, _ in one_by_one(built, pairs)], abs=1e-5)


def rows_of(pairs: list[Pair]) -> list[tuple[int, list[int]]]:
    """Trunks and rows, in tokens."""
    return [(len(trunk.ids), [row.count for row in trunk.rows]) for trunk in arrange(pairs)]


def test_what_is_shared_runs_once(model):
    draw = random.Random(0)
    question, choices = drawn(draw, 50), [drawn(draw, 10) for _ in range(4)]
    assert rows_of([(question, choice) for choice in choices]) == [(0, [50 + 4 * 9])], "a question and its choices"
    assert rows_of([(question, [letter]) for letter in range(4)]) == [(0, [50])], "letters"
    assert rows_of([(question, choices[0][:n]) for n in (1, 4, 10)]) == [(0, [59])], "beginnings of one another"
    shots = drawn(draw, 400)
    pairs = [(shots + drawn(draw, 50), [0]) for _ in range(20)]
    (length, rows), = rows_of(pairs)
    assert 400 <= length <= 402 and 20 * 48 <= sum(rows) <= 20 * 50, "demonstrations before twenty questions"
    scorer = Scorer(model, CONFIG)
    scorer.score(pairs)
    assert scorer.tokens_run == length + sum(rows) and scorer.tokens_asked == 20 * 450


def test_trunks_stand_on_trunks():
    """Subjects with demonstrations of their own behind one description; only what is new runs."""
    draw = random.Random(1)
    description = drawn(draw, 100)
    subjects = [description + drawn(draw, 200) for _ in range(3)]
    pairs = [(subject + drawn(draw, 40), [0]) for subject in subjects for _ in range(10)]
    assert sorted(length for length, _ in rows_of(pairs)) == pytest.approx([300, 300, 300], abs=3)
    model = build_model(CONFIG, seed=1)
    scorer = Scorer(model, CONFIG)
    scorer.score(pairs)
    assert scorer.tokens_run <= 100 + 3 * 200 + 30 * 40 + 9


def test_only_what_predicts_reaches_the_head(model):
    """And each token once, whatever is asked of it."""
    seen = []
    handle = model[-1].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    draw = random.Random(2)
    pairs = [(context, [letter]) for context in (drawn(draw, 30), drawn(draw, 40)) for letter in range(4)]
    Scorer(model, CONFIG).score([*pairs, (drawn(draw, 20), drawn(draw, 7))])
    handle.remove()
    assert seen == [(2 + 7, 32)]


def test_logits_are_computed_in_parts(model, monkeypatch):
    from megatron_ttl.evaluate import scoring

    pairs = random_pairs(3, 6, 0, 0)
    whole = Scorer(model, CONFIG).score(pairs)
    monkeypatch.setattr(scoring, "_LOGIT_NUMBERS", 5 * CONFIG.vocab_size)
    assert Scorer(model, CONFIG).score(pairs) == [(pytest.approx(nats, abs=1e-5), greedy) for nats, greedy in whole]


def test_among_equals_the_first_is_greedy():
    """A head of zeros finds all tokens equally probable."""
    built = build_model(CONFIG, seed=1)
    built[-1].lm_head.weight.data.zero_()
    scores = Scorer(built, CONFIG).score([([5, 6], [0, 0]), ([5, 6], [0, 1]), ([5, 6], [60])])
    assert [greedy for _, greedy in scores] == [True, False, False]
    assert [nats for nats, _ in scores] == pytest.approx([-2 * math.log(61), -2 * math.log(61), -math.log(61)])


def test_as_long_as_the_model_and_no_longer(model):
    ids = drawn(random.Random(3), 641)
    pairs = [(ids[:600], ids[600:])]
    assert Scorer(model, CONFIG).score(pairs)[0][0] == pytest.approx(one_by_one(model, pairs)[0][0], abs=1e-5)
    for wrong in [(ids, [1]), ([], [1]), ([1], [])]:
        with pytest.raises(AssertionError, match="see Args"):
            Scorer(model, CONFIG).score([wrong])


def test_a_model_in_training_goes_on():
    """Scoring leaves nothing behind that autograd would refuse."""
    built = build_model(CONFIG, seed=1)
    Scorer(built, CONFIG).score(random_pairs(4, 10, 300, 0))
    built(torch.arange(20)[None]).sum().backward()
    assert all(weight.grad is not None for weight in built.parameters())


def test_numbers_that_are_none_are_refused():
    built = build_model(CONFIG, seed=1)
    built[1].self_attn.o_proj.weight.data[0, 0] = math.inf
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        Scorer(built, CONFIG).score([([1, 2], [3])])


def test_progress_counts_requests(model):
    told: list[int] = []
    pairs = random_pairs(6, 9, 40, 50)
    Scorer(model, CONFIG, 1).score(pairs, told.append)
    assert told == sorted(told) and told[-1] == len(pairs) and len(told) > 1

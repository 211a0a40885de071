"""Answers of a model: those of lm-eval's backend for Hugging Face models, item by item; and the cases it leaves open."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_backend import hf_backend
from questions import (
    KINDS,
    POSITIONS,
    Question,
    pairs_of,
    real_questions,
    taught_weights,
    write_taught_folder,
    written_questions,
)
from tiny_folder import documents

from megatron_ttl.errors import CheckpointError, DataError
from megatron_ttl.evaluate.answer import ModelAnswerer
from megatron_ttl.evaluate.task import GenerationRequest, Request
from megatron_ttl.generate.open_folder import OpenModel, open_model_folder
from megatron_ttl.tokenizer.tokenizer import Tokenizer

CLOSE = 1e-4
COARSE = 4e-7
"""Of a log-likelihood beyond 250 nats: lm-eval adds up in fp32, whose numbers there lie 3e-5 apart, and 6e-5 beyond 512."""
STOPS = ("\n", ".", " o", "ade", "a m", "nunca")


@pytest.fixture(scope="module")
def weights(tokenizer_folder: Path) -> dict[str, torch.Tensor]:
    return taught_weights(Tokenizer.load(tokenizer_folder))


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path,
           weights: dict[str, torch.Tensor]) -> Path:
    """A model folder whose texts begin with BOS, and one whose texts do not."""
    return write_taught_folder(tmp_path_factory.mktemp("taught") / "m", weights, Tokenizer.load(tokenizer_folder),
                               request.param)


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenModel:
    return open_model_folder(folder, "cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """lm-eval's backend on transformers' model of the same folder."""
    return hf_backend(folder, batch=8)


def requests_of(pairs: list[tuple[str, str]]) -> list[Request]:
    return [Request(context, continuation, number) for number, (context, continuation) in enumerate(pairs)]


def asked(texts: list[tuple]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=text) for text in texts]


def largest_difference(ours: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> float:
    """Compare; whether an answer is greedy must be the same."""
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    differences = [(abs(a - b), abs(b)) for (a, _), (b, _) in zip(ours, expected, strict=True)]
    assert all(difference <= max(CLOSE, COARSE * size) for difference, size in differences), max(differences)
    return max(difference for difference, _ in differences)


def check_kind(kind: str, questions: list[Question], opened: OpenModel, theirs: Any) -> tuple[float, float]:
    """Compare with lm-eval, and batch sizes with each other; return the largest differences."""
    pairs = pairs_of(kind, questions)
    if not opened.add_bos:  # lm-eval has no answer to a context of white space without BOS
        pairs = [(context, continuation) for context, continuation in pairs if not context or context.strip()]
    expected = theirs.loglikelihood(asked(pairs), disable_tqdm=True)
    first, *others = [ModelAnswerer(opened, batch) for batch in (8, 1, 3, 64)]
    ours = first.loglikelihood(requests_of(pairs))
    assert (first.truncated == len(pairs)) if kind == "too long" else (first.truncated < len(pairs) / 2), kind
    moved = max(largest_difference(other.loglikelihood(requests_of(pairs)), ours) for other in others)
    return largest_difference(ours, expected), moved


def test_log_likelihoods_are_lm_evals(opened: OpenModel, theirs: Any) -> None:
    for kind in KINDS:
        check_kind(kind, written_questions(3, seed=1), opened, theirs)


@pytest.mark.long
def test_log_likelihoods_of_200_items_of_each_kind(opened: OpenModel, theirs: Any, shared_data: Path) -> None:
    for name, questions in (("written", written_questions(200)), ("real", real_questions(shared_data / "tasks", 200))):
        for kind in KINDS:
            apart, moved = check_kind(kind, questions, opened, theirs)
            print(f"{name}, {kind}: {apart:.1e} from lm-eval, {moved:.1e} between batch sizes")


def test_rolling_is_lm_evals(opened: OpenModel, theirs: Any) -> None:
    texts = ["", "a", "🙂", *documents(6, 1), " ".join(documents(20, 2)), " ".join(documents(25, 4))]
    expected = theirs.loglikelihood_rolling(asked([(text,) for text in texts]), disable_tqdm=True)
    ours = ModelAnswerer(opened, 3).rolling(texts)
    assert min(ours) < -600, "some text must be longer than the model has positions"
    assert [round(abs(a - b) / max(1, abs(a)), 6) for a, b in zip(ours, expected, strict=True)] == [0.0] * len(texts)


def generation_requests(count: int) -> list[GenerationRequest]:
    draw = random.Random(2)
    shown = documents(40, 9)
    texts = ["Era uma vez. " * 2 + draw.choice(shown)[: draw.randint(1, 50)] for _ in range(count)]
    texts[0] = " ".join(shown)  # does not fit
    return [GenerationRequest(text, tuple(draw.sample(STOPS, draw.randint(0, 3))), draw.choice((1, 9, 30)), number)
            for number, text in enumerate(texts)]


def test_greedy_answers_are_lm_evals(opened: OpenModel, theirs: Any) -> None:
    """But for bytes that are no UTF-8: lm-eval shows the ASCII beside them as such bytes too."""
    requests = generation_requests(30)
    expected = theirs.generate_until(asked([(one.context, {"until": list(one.until), "max_gen_toks": one.max_new_tokens})
                                            for one in requests]), disable_tqdm=True)
    answerer = ModelAnswerer(opened, 4)
    ours = answerer.generate(requests)
    readable = [number for number, text in enumerate(expected) if "\ufffd" not in text]
    assert len(readable) > 20 and len(set(expected)) > 12
    assert [ours[number] for number in readable] == [expected[number] for number in readable]
    assert answerer.truncated == 1
    assert ModelAnswerer(opened, 1).generate(requests) == ours
    pairs = [(one.context, text) for one, text in zip(requests, ours, strict=True) if text.strip()]
    scored = answerer.loglikelihood(requests_of(pairs))
    largest_difference(scored, theirs.loglikelihood(asked(pairs), disable_tqdm=True))
    assert sum(greedy for _, greedy in scored) > len(pairs) / 2, "what greedy decoding says is greedy"


# --- what lm-eval leaves open ---


@pytest.fixture(scope="module")
def answerer(opened: OpenModel) -> ModelAnswerer:
    return ModelAnswerer(opened)


def log_shares(opened: OpenModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities at every position, by one plain forward pass."""
    with torch.no_grad():
        return opened.model(torch.tensor([ids]))[0].double().log_softmax(-1)


def plain(opened: OpenModel, before: list[int], after: list[int]) -> float:
    shares = log_shares(opened, [*before, *after][:-1])[-len(after) :]
    return float(shares[range(len(after)), after].sum())


def test_no_continuation_is_certain(answerer: ModelAnswerer) -> None:
    assert answerer.loglikelihood([Request("a menina", "", 0), Request("", "", 1)]) == [(0.0, True)] * 2
    assert answerer.loglikelihood([]) == [] == answerer.rolling([]) == answerer.generate([])


def test_a_continuation_that_merges_into_the_context(opened: OpenModel, answerer: ModelAnswerer) -> None:
    """Where context and continuation become fewer tokens than the context alone, the last token is the continuation."""
    encode = opened.tokenizer.encode
    context, continuation = next(
        (text[:end], text[end : end + 1]) for text in documents(40) for end in range(2, len(text))
        if len(encode(text[: end + 1])) <= len(encode(text[:end])) and text[:end] == text[:end].rstrip())
    whole = encode(context + continuation)
    before = ([1] if opened.add_bos else []) + whole[:-1] or [1]
    (ours, _), = answerer.loglikelihood([Request(context, continuation, 0)])
    assert ours == pytest.approx(plain(opened, before, whole[-1:]), abs=CLOSE)


def test_a_continuation_longer_than_the_model(opened: OpenModel) -> None:
    """It is read in windows behind the context's last token, and counted."""
    text = " ".join(documents(30, 5))
    context, continuation = "a menina", " " + text
    ids = opened.tokenizer.encode(context + continuation)[len(opened.tokenizer.encode(context)) :]
    assert len(ids) > 2 * POSITIONS
    last = opened.tokenizer.encode(context)[-1]
    expected, tokens = 0.0, [last, *ids]
    for start in range(0, len(ids), POSITIONS):
        count = min(POSITIONS, len(ids) - start)
        window = tokens[max(start + count - POSITIONS, 0) : start + count + 1]
        expected += plain(opened, window[:-count], window[-count:])
    answerer = ModelAnswerer(opened)
    (ours, _), = answerer.loglikelihood([Request(context, continuation, 0)])
    assert ours == pytest.approx(expected, rel=1e-6)
    assert answerer.truncated == 1


def test_exactly_as_long_as_the_model(opened: OpenModel) -> None:
    """So many tokens as positions and one more, which is only predicted, are not cut; another one is."""
    words = " ".join(documents(30, 6)).split(" ")
    for extra, truncated in ((1, 0), (2, 1)):
        answerer, count = ModelAnswerer(opened), 0
        while len(ids := opened.tokenizer.encode(" ".join(words[:count]))) < POSITIONS + extra - opened.add_bos:
            count += 1
        context = opened.tokenizer.decode(ids[: POSITIONS + extra - opened.add_bos])
        if opened.tokenizer.encode(context) == ids[: POSITIONS + extra - opened.add_bos]:
            cut = context.rindex(" ")
            answerer.loglikelihood([Request(context[:cut], context[cut:], 0)])
            assert answerer.truncated == truncated, extra


def test_text_that_spells_a_special_piece_is_text(opened: OpenModel, answerer: ModelAnswerer) -> None:
    (ours, _), = answerer.loglikelihood([Request("a menina", " </s>", 0)])
    ids = opened.tokenizer.encode("a menina </s>")
    assert 2 not in ids
    count = len(opened.tokenizer.encode("a menina"))
    before = ([1] if opened.add_bos else []) + ids[:count]
    assert ours == pytest.approx(plain(opened, before, ids[count:]), abs=CLOSE)


def test_half_a_character_is_refused(answerer: ModelAnswerer) -> None:
    with pytest.raises(DataError, match="lone surrogate U\\+D83D"):
        answerer.loglikelihood([Request("a \ud83d", " b", 0)])


def test_a_damaged_model_is_refused(opened: OpenModel) -> None:
    weight = opened.model[1].mlp.down_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = float("nan")
    try:
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            ModelAnswerer(opened).loglikelihood([Request("a", " b", 0)])
    finally:
        weight.data.copy_(kept)


def test_sampled_answers_have_seeds_of_their_own(opened: OpenModel) -> None:
    """An answer depends on seed, item and choice alone: not on what is asked beside it, and not on the batch."""
    requests = [GenerationRequest("Era uma vez", ("\n",), 12, item, choice, 1.0) for item in range(3) for choice in range(4)]
    answers = ModelAnswerer(opened, 12).generate(requests)
    assert len(set(answers)) > 8
    assert ModelAnswerer(opened, 5).generate(requests[::-1]) == answers[::-1]
    assert ModelAnswerer(opened, 12).generate(requests[5:6]) == answers[5:6]
    assert ModelAnswerer(opened, 12, seed=1).generate(requests) != answers


def test_progress_is_told(opened: OpenModel) -> None:
    told: list[int] = []
    ModelAnswerer(opened, 2).loglikelihood(requests_of([("a", " b")] * 5), told.append)
    ModelAnswerer(opened, 2).generate(generation_requests(3), told.append)
    assert told == [5, 5, *told[2:-1], 3] and told[2:] == sorted(told[2:])
    told.clear()
    ModelAnswerer(opened, 1).rolling(["a menina viu o rio. " * 150, "o trem"], told.append)
    assert told == sorted(told) and told[-1] == 2 and len(told) > 2

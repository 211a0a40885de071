"""Near duplicates against the theory, on pairs whose similarity is known exactly, and against another library."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import count, islice

import datasketch
import numpy as np
import pytest
from corpus_shards import write_shards
from scipy.stats import binom

from megatron_ttl.data.corpus.dedup import DedupSettings, find_duplicates
from megatron_ttl.data.corpus.minhash import band_keys, collision_probability, signature_version, signatures
from megatron_ttl.data.corpus.ngrams import ngram_hashes, normalise, words_of

SHINGLES = 800  # of a document; below some hundred the curve of one document is a little steeper than the theory
PAIRS = {0.3: 500, 0.5: 400, 0.7: 400, 0.8: 400, 0.9: 400}
UNSURE = 5e-4  # probability that a right program fails, on either side


def pair(similarity: float, fresh: Iterator[int]) -> tuple[list[str], list[str]]:
    """Return two documents that share their beginning and nothing else, no word twice in either."""
    shared = round(2 * SHINGLES * similarity / (1 + similarity)) + 4  # s shingles of five words stand in s + 4 words
    first = [f"w{number}" for number in islice(fresh, SHINGLES + 4)]
    return first, first[:shared] + [f"w{number}" for number in islice(fresh, SHINGLES + 4 - shared)]


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    """Return the sets of five words of a document."""
    return {tuple(words[place:place + 5]) for place in range(len(words) - 4)}


def jaccard(left: set, right: set) -> float:
    """Return the similarity of two sets."""
    return len(left & right) / len(left | right)


@pytest.fixture(scope="module")
def planted() -> dict[float, list[tuple[list[str], list[str]]]]:
    fresh = count()
    return {similarity: [pair(similarity, fresh) for _ in range(number)] for similarity, number in PAIRS.items()}


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory) -> tuple[dict[float, int], int]:
    """Pairs that were found, by similarity, and documents that were dropped for one that is not their pair's."""
    folder = tmp_path_factory.mktemp("recall")
    pairs = [(similarity, each) for similarity, some in planted.items() for each in some]
    shards = write_shards(folder / "in", [[" ".join(both[side]) for _, both in pairs] for side in (0, 1)])
    settings = DedupSettings(exact=False, paragraphs=False)
    decisions = find_duplicates(shards, settings, folder / "work", 1).of_shard(1)
    hits, wrong = dict.fromkeys(PAIRS, 0), 0
    for line, decision in decisions.items():
        hits[pairs[line - 1][0]] += 1
        wrong += decision.dropped.value != f"a/0:{line}"
    return hits, wrong


@pytest.mark.parametrize("similarity", PAIRS)
def test_recall_lies_within_the_binomial_interval_of_the_theory(planted, found, similarity):
    pairs = planted[similarity]
    true = jaccard(*map(shingles, pairs[0]))
    assert abs(true - similarity) < 0.001
    expected = collision_probability(true, 14, 8)
    assert expected == pytest.approx(1 - (1 - true**8) ** 14)
    low, high = binom.ppf([UNSURE, 1 - UNSURE], len(pairs), expected)
    assert low <= found[0][similarity] <= high, f"{found[0][similarity]} of {len(pairs)} found, {expected:.4f} expected"


def test_nothing_is_joined_that_shares_nothing(found):
    assert found[1] == 0


def test_another_library_finds_as_many(planted):
    """datasketch's signatures, banded alike, find the same share of the pairs at the steepest place of the curve."""
    pairs, hits, estimates = planted[0.7][:150], 0, {"ours": [], "theirs": []}
    for both in pairs:
        sides, hashes = [], []
        for words in both:
            theirs = datasketch.MinHash(112, seed=3)
            theirs.update_batch([" ".join(shingle).encode() for shingle in shingles(words)])
            sides.append(theirs)
            *_, own = ngram_hashes(words, 5)
            hashes.append(own)
        values = [side.hashvalues.reshape(14, 8) for side in sides]
        hits += bool((values[0] == values[1]).all(axis=1).any())
        estimates["theirs"].append(sides[0].jaccard(sides[1]))
        rows = signatures(hashes, 112)
        estimates["ours"].append((rows[0] == rows[1]).mean())
        keys = band_keys(rows, 14)
        assert (keys[:, 0] == keys[:, 1]).tolist() == (rows[0] == rows[1]).reshape(14, 8).all(axis=1).tolist()
    low, high = binom.ppf([UNSURE, 1 - UNSURE], len(pairs), collision_probability(0.7, 14, 8))
    assert low <= hits <= high
    for name, values in estimates.items():
        # The error of the mean of 150 estimates from 112 hashes each is 0.0035.
        assert np.mean(values) == pytest.approx(0.7, abs=0.012), name


def test_signatures_are_those_of_every_process_and_machine():
    """Values that are written down: were they to change, what a killed run left would not fit what follows."""
    many = np.arange(1, 900, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = signatures([many, np.arange(3, dtype=np.uint64)], 112)
    assert rows.shape == (2, 112) and rows.dtype == np.uint32
    assert rows[:, :3].tolist() == [[240145837, 54214011, 196633033], [3264571612, 3592674595, 3412090254]]
    assert signature_version().startswith("rensa ") and signatures([], 112).shape == (0, 112)


def test_runs_of_words_differ_by_words_and_order():
    def hashes(text: str) -> list[list[int]]:
        return [size.tolist() for size in ngram_hashes(text.split(), 3)]

    one, two, three = hashes("a b c a b")
    assert [len(one), len(two), len(three)] == [5, 4, 3]
    assert one[0] == one[3] and two[0] == two[3] and len(set(two)) == 3 and len(set(three)) == 3
    assert hashes("b a")[1] != hashes("a b")[1] and hashes("ab c")[1] != hashes("a bc")[1]
    assert hashes("") == [] and len(hashes("a b")) == 2


def test_words_are_runs_of_letters_marks_and_digits():
    text = unicodedata.normalize("NFD", "À beira-mar, «NÃO» há 3,5 ÍNDIOS…\u00a0हिन्दी भाषा")
    assert words_of(normalise(text)) == ["à", "beira", "mar", "não", "há", "3", "5", "índios", "हिन्दी", "भाषा"]
    assert normalise(" Straße\t\n ") == "strasse" and normalise("\u01f0") == normalise("J\u030c")

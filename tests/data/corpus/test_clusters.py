"""Clusters are the connected parts of a graph, whatever the order in which its edges come."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megatron_ttl.data.corpus.clusters import Numbers, join, join_band, roots, settle
from megatron_ttl.data.corpus.dedup_settings import DedupSettings

COUNT = 40
EDGES = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=60)


@given(st.lists(EDGES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_document_is_led_by_the_smallest_of_its_part(batches):
    parents = np.arange(COUNT)
    for batch in batches:
        left, right = np.array(batch, np.int64).reshape(-1, 2).T
        join(parents, left, right)
    edges = [edge for batch in batches for edge in batch]
    left, right = np.array(edges, np.int64).reshape(-1, 2).T
    _, part = connected_components(coo_array((np.ones(len(edges)), (left, right)), shape=(COUNT, COUNT)), directed=False)
    smallest = [int(np.flatnonzero(part == part[number])[0]) for number in range(COUNT)]
    assert roots(parents, np.arange(COUNT)).tolist() == smallest == settle(parents).tolist()


def test_a_chain_of_a_million_is_short_work():
    """Were the ways not shortened, this would take a million steps."""
    parents = np.arange(1_000_000)
    join(parents, parents[1:].copy(), parents[:-1].copy())
    assert not settle(parents).any()


def crowd(kinds: list[int]) -> tuple[list[SimpleNamespace], np.ndarray]:
    """Return documents that share the key of a band, and which of them are alike: those of one kind."""
    entries = np.zeros((1, len(kinds)), [("key", "<u8"), ("row", "<u4")])
    entries["row"] = np.arange(len(kinds))
    rows = np.array([[kind] * 10 for kind in kinds], np.uint32)
    rows[:, 0] = np.arange(len(kinds))  # nine of ten hashes are equal
    scan = SimpleNamespace(documents=np.zeros(len(kinds), [("source", "<u4")]), sources=["a"], bands=lambda count: entries,
                           signatures=lambda num_hashes: rows)
    return [scan], np.arange(len(kinds))


def test_of_a_crowd_every_kind_has_its_leader():
    scans, parents = crowd([3, 5, 3, 7, 5, 7, 7, 9])
    join_band(scans, Numbers(scans, ()), 0, DedupSettings(bands=1, rows=10, min_similarity=0.9), parents, parents >= 0)
    assert roots(parents, np.arange(8)).tolist() == [0, 1, 0, 3, 1, 3, 3, 7]
    scans, parents = crowd([3, 5, 3, 7, 5, 7, 7, 9])
    join_band(scans, Numbers(scans, ()), 0, DedupSettings(bands=1, rows=10, min_similarity=0.91), parents, parents >= 0)
    assert parents.tolist() == list(range(8))

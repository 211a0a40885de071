"""The collector rests while steps run, and is as it was afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from megatron_ttl.train.garbage import QuietCollector


class Ring:
    """Garbage that only the collector can find."""

    def __init__(self):
        self.self = self


def test_it_rests_between_the_first_step_and_the_end():
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with pytest.raises(ValueError, match="a step"), QuietCollector() as collector:
        assert gc.isenabled(), "the first step's garbage is still to come"
        collector.settle()
        assert not gc.isenabled() and gc.get_freeze_count() > frozen
        ring = weakref.ref(Ring())
        collector.settle()  # at every later step: nothing
        assert ring() is not None
        collector.collect()
        assert ring() is None
        raise ValueError("a step")
    assert gc.isenabled() and gc.get_freeze_count() == 0

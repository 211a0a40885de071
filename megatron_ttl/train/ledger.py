"""The ledger of the data: what was drawn from each source in each stage, and how often that reads it.

A pure function of the position in the data and of the samples that were left out. No torch: `--dry-run` asks it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from megatron_ttl.config.schema import RunFile
from megatron_ttl.config.stages import name_of, stages_of
from megatron_ttl.data.causal_lm_dataset import CausalLMDataset
from megatron_ttl.data.mixture import StagedMixture

MAX_USEFUL_EPOCHS = 4
"""Source: Muennighoff et al. 2023, section 6: repeating data up to four times costs next to nothing."""

_THOUSANDTH = Fraction(1, 1000)


class Ledger:
    """Counts by source, each known by its prefix.

    Args:
        run: the run file.
        dataset: its data.

    Attributes:
        left_out: [first, after the last) of the samples that the run passed over without learning from them.
    """

    def __init__(self, run: RunFile, dataset: CausalLMDataset) -> None:
        self._run, self._mixture = run, dataset.mixture
        self._sizes = {source.prefix: size for source, size in
                       zip(run.data.sources, dataset.samples_per_epoch, strict=True)}
        self._passed = self._mixture.counts_by_stage(0)
        self._told: set[str] = set()
        self.left_out: list[list[int]] = []

    def load(self, record: Mapping[str, Any], consumed_samples: int) -> None:
        """Go on from a checkpoint's record; one without a ledger is of a release that counted what it left out."""
        for first, stop in record.get("left_out_samples", ()):
            self.leave_out(first, stop)
        self._told = set(self.over(consumed_samples))

    def leave_out(self, first: int, stop: int) -> None:
        """Note samples that are passed over."""
        if self.left_out and self.left_out[-1][1] == first:
            self.left_out[-1][1] = stop
        else:
            self.left_out.append([first, stop])
        count = self._mixture.counts_by_stage
        self._passed = [[so_far + after - before for so_far, after, before in zip(*stage, strict=True)]
                        for stage in zip(self._passed, count(stop), count(first), strict=True)]

    def samples(self, consumed_samples: int) -> dict[str, int]:
        """Return how many samples of each source the run learnt from."""
        return dict(zip(self._sizes, map(sum, zip(*self._by_stage(consumed_samples), strict=True)), strict=True))

    def row(self, consumed_samples: int) -> dict[str, Any]:
        """Return what a row of metrics and a checkpoint say: epochs and tokens of each source so far."""
        drawn = self.samples(consumed_samples)
        return {"epochs": {prefix: count / self._sizes[prefix] for prefix, count in drawn.items()},
                "drawn_tokens": {prefix: count * self._run.train.sequence_length for prefix, count in drawn.items()}}

    def over(self, consumed_samples: int) -> dict[str, float]:
        """Return the epochs of the sources that are read too often by then."""
        drawn = self.samples(consumed_samples)
        return {prefix: count / self._sizes[prefix] for prefix, count in drawn.items()
                if count > MAX_USEFUL_EPOCHS * self._sizes[prefix]}

    def newly_over(self, consumed_samples: int) -> dict[str, float]:
        """Return the same, each source once."""
        found = {prefix: epochs for prefix, epochs in self.over(consumed_samples).items() if prefix not in self._told}
        self._told.update(found)
        return found

    def table(self, consumed_samples: int) -> dict[str, Any]:
        """Return what was drawn by stage and source, asked and realised."""
        s = self._run.train.sequence_length
        return {"consumed_tokens": consumed_samples * s,
                "left_out_tokens": sum(stop - first for first, stop in self.left_out) * s,
                **_table(self._run, self._mixture, self._by_stage(consumed_samples), list(self._sizes.values()))}

    def _by_stage(self, consumed_samples: int) -> list[list[int]]:
        """Return the samples that the run learnt from; what was left out lies before.  # [stages][sources]"""
        return [[count - passed for count, passed in zip(*stage, strict=True)]
                for stage in zip(self._mixture.counts_by_stage(consumed_samples), self._passed, strict=True)]


def planned_table(run: RunFile, samples_per_epoch: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what the whole run will draw, by stage and source.

    Args:
        run: without faults.
        samples_per_epoch: of each source; absent: not known.
    """
    s = run.train.sequence_length
    mixture = StagedMixture([(until and until // s, weights) for until, weights in stages_of(run.data)])
    return _table(run, mixture, mixture.counts_by_stage(run.total_steps * run.samples_per_step), samples_per_epoch)


def _table(run: RunFile, mixture: StagedMixture, drawn: Sequence[Sequence[int]], samples_per_epoch: Sequence[int] | None
           ) -> dict[str, Any]:
    s, sources = run.train.sequence_length, run.data.sources
    sizes = samples_per_epoch or [None] * len(sources)

    def row(samples: int, size: int | None) -> dict[str, Any]:
        return {"tokens": samples * s, "epochs": samples / size if size else None}

    stages = []
    for stage, begin, counts in zip(mixture.stages, mixture.begins, drawn, strict=True):
        total = sum(counts)
        stages.append({
            "from_token": begin * s, "tokens": total * s,
            "within_a_thousandth_after_tokens": stage.samples_until_within(_THOUSANDTH) * s,
            "sources": {source.prefix: {"asked_share": float(asked), "share": count / total if total else None,
                                        **row(count, size)}
                        for source, asked, count, size in zip(sources, stage.shares, counts, sizes, strict=True)}})
    totals = [sum(counts) for counts in zip(*drawn, strict=True)]
    return {"sources": {source.prefix: {"name": name_of(source), "tokens_per_epoch": size and size * s, **row(total, size)}
                        for source, total, size in zip(sources, totals, sizes, strict=True)},
            "stages": stages}

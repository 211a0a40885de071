"""Learning curves over tokens: what was logged, what was held out, what a scaling law says, what tasks gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from megatron_ttl.evaluate.records import DEPENDENCIES, ScoreRecord, value_of
from megatron_ttl.plan.scaling_laws import OTHER_TOKENIZER, ScalingLaw
from megatron_ttl.report.figure import Figure, Mark, Series, file_stem, printable
from megatron_ttl.report.runs import Run

_WINDOW_SHARE = 50
_LARGEST_EXPONENT = 700.0


def smooth(tokens: Sequence[float], values: Sequence[float], window: float) -> list[float]:
    """Average each value with those within half a window of tokens on either side.

    Near both ends the window shrinks on both sides alike, for a one-sided mean of a falling curve lies beside it.

    Args:
        tokens: rising, [n].
        values: [n].
        window: in tokens.
    """
    if not len(tokens):
        return []
    places, sums = np.asarray(tokens, float), np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    half = np.minimum(np.minimum(places - places[0], places[-1] - places), window / 2)
    first, end = np.searchsorted(places, places - half, "left"), np.searchsorted(places, places + half, "right")
    return ((sums[end] - sums[first]) / (end - first)).tolist()


def run_figures(runs: Sequence[Run], laws: Sequence[ScalingLaw] = (), window: float | None = None) -> list[Figure]:
    """Make the figures that rows of metrics can fill; one that would be empty is left out.

    Args:
        runs: drawn together.
        laws: what to compare held-out loss with.
        window: tokens over which the loss of training is averaged; None: a fiftieth of the longest run.
    """
    longest = max((run.train[-1]["tokens"] for run in runs if run.train), default=0)
    window = window or max(1.0, longest / _WINDOW_SHARE)
    figures = [_training_loss(runs, window),
               _held_out(runs, "held_out_loss", "Held-out loss", "nats per token", lambda loss: loss),
               _held_out(runs, "held_out_perplexity", "Held-out perplexity", "perplexity",
                         lambda loss: math.exp(min(loss, _LARGEST_EXPONENT))),
               _predictions(runs, laws), *_signals(runs),
               _column(runs, "lr", "learning_rate", "Learning rate", "learning rate"),
               _column(runs, "grad_norm", "gradient_norm", "Gradient norm before clipping", "gradient norm")]
    return [figure for figure in figures if any(len(series.tokens) for series in figure.series)]


def _training_loss(runs: Sequence[Run], window: float) -> Figure:
    series = []
    for colour, run in enumerate(runs):
        tokens, losses = run.column("loss")
        series.append(Series(f"{run.name}, as logged", tokens, losses, kind="raw", colour=colour))
        series.append(Series(run.name, tokens, smooth(tokens, losses, window), colour=colour))
    marks = [Mark(row["event"], run.name, row["tokens"]) for run in runs for row in run.events]
    return Figure("training_loss", "Training loss", "nats per token", series, marks,
                  f"Strong line: mean over {window:,.0f} tokens around each point, fewer at both ends. "
                  "Faint line: as logged. Steps that moved no weight have no loss.")


def _held_out(runs: Sequence[Run], name: str, title: str, unit: str,
              scale: Callable[[float], float]) -> Figure:
    series = []
    for colour, run in enumerate(runs):
        for prefix in run.measured("loss"):
            tokens, losses = run.evaluation("loss", prefix)
            series.append(Series(f"{run.name}: {prefix}", tokens, [scale(loss) for loss in losses], colour=colour))
    return Figure(name, title, unit, series, note="Every token of the held-out text weighs the same.")


def _signals(runs: Sequence[Run]) -> Iterator[Figure]:
    """Show what runs measured of tasks while they trained."""
    for task in dict.fromkeys(task for run in runs for task in run.measured("accuracy")):
        series = []
        for colour, run in enumerate(runs):
            tokens, values = run.evaluation("accuracy", task)
            errors = dict(zip(*run.evaluation("accuracy_stderr", task), strict=True))
            series.append(Series(run.name, tokens, values, [errors.get(place) for place in tokens], "points", colour))
        yield Figure(file_stem(f"signal_{task}"), f"{task}, during training", "accuracy", series,
                     note="Bars: one standard error.")


def _predictions(runs: Sequence[Run], laws: Sequence[ScalingLaw]) -> Figure:
    """Put held-out loss beside what each law says for the model's size and the tokens that it has read."""
    series: list[Series] = []
    predicted: set[int] = set()
    for colour, run in enumerate(runs):
        points = [run.evaluation("loss", prefix) for prefix in run.measured("loss")]
        seen = [tokens for row, _ in points for tokens in row if tokens > 0]
        if not laws or not seen or run.parameters is None:
            continue
        for prefix, (tokens, losses) in zip(run.measured("loss"), points, strict=True):
            known = [(place, loss) for place, loss in zip(tokens, losses, strict=True) if place > 0]
            series.append(Series(f"{run.name}: {prefix}", *_columns(known), colour=colour))
        if run.parameters in predicted:
            continue
        predicted.add(run.parameters)
        grid = np.geomspace(min(min(seen), max(seen) / 10), max(seen), 50).tolist()
        series += [Series(f"{law.name}, {run.parameters:,} parameters", grid,
                          [law.loss(run.parameters, place) for place in grid], kind="prediction",
                          colour=len(runs) + number) for number, law in enumerate(laws)]
    sources = "; ".join(f"{law.name}: {law.source}" for law in laws)
    return Figure("scaling_laws", "Held-out loss and scaling laws", "nats per token", series, log_x=True,
                  note=f"Not to be compared in level: {OTHER_TOKENIZER}. {sources}.")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [place for place, _ in points], [value for _, value in points]


def _column(runs: Sequence[Run], key: str, name: str, title: str, unit: str) -> Figure:
    return Figure(name, title, unit, [Series(run.name, *run.column(key), colour=colour) for colour, run in enumerate(runs)])


def score_figures(records: Iterable[ScoreRecord]) -> tuple[list[Figure], int]:
    """Make a figure per task and metric of scores over tokens: accuracy per checkpoint.

    Scores stand in one figure only if they may stand in one column of a table: task, version, shots, prompt, data and so
    on are the same. Of a checkpoint that was scored twice the later score counts.

    Returns:
        The figures, and how many scores say nothing of the tokens that their model has seen.
    """
    groups: dict[tuple, dict[tuple, ScoreRecord]] = {}
    unplaced = 0
    for record in records:
        if record.model.tokens is None:
            unplaced += 1
            continue
        alike = tuple(value_of(record, each.path) for each in DEPENDENCIES if each.same_column)
        groups.setdefault(alike, {})[_label(record), record.model.tokens] = record
    found = [list(group.values()) for group in groups.values()]
    names = [file_stem(f"score_{records[0].task}_{records[0].metric}") for records in found]
    names = [f"{name}_{1 + names[:number].count(name)}" if name in names[:number] else name
             for number, name in enumerate(names)]
    return [_score_figure(name, records) for name, records in zip(names, found, strict=True)], unplaced


def _label(record: ScoreRecord) -> str:
    return printable(record.model.run or record.model.name)


def _score_figure(name: str, records: Sequence[ScoreRecord]) -> Figure:
    one = records[0]
    series = []
    models = list(dict.fromkeys(map(_label, records)))
    for colour, model in enumerate(models):
        row = sorted((record for record in records if _label(record) == model),
                     key=lambda record: record.model.tokens or 0)
        series.append(Series(model, [record.model.tokens or 0 for record in row], [record.value for record in row],
                             [record.stderr for record in row], "points", colour))
    last = max(record.model.tokens or 0 for record in records)
    series += [Series(printable(f"baseline: {baseline}"), [last], [value], kind="level", colour=len(models) + number)
               for number, (baseline, value) in enumerate(sorted(one.baselines.items()))]
    return Figure(name, printable(f"{one.task}, {one.metric}"), printable(one.metric), series,
                  note=printable(" ".join(_score_notes(records))))


def _score_notes(records: Sequence[ScoreRecord]) -> Iterator[str]:
    one = records[0]
    asked = sorted({record.n for record in records})
    yield (f"{one.task} {one.version} ({one.definition}), {one.shots} shots, {' or '.join(f'{n:,}' for n in asked)} "
           "questions; bars: one standard error.")
    if one.limit is not None:
        yield f"Only the first {one.limit:,} questions."
    if any(record.sample for record in records):
        yield "Only a sample of the real test set."

"""Recompute what the papers of TeenyTinyLlama and TinyLlama print from the rows that they print: misprints show.

Nothing here is typed in but formulas: every figure comes from a file of published rows, and says from which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean

from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.console import print_result, print_table
from megatron_ttl.errors import DataError
from megatron_ttl.model.flops import count_parameters, embedding_parameters, norm_parameters
from megatron_ttl.plan.scaling_laws import SCALING_LAWS, ScalingLaw
from megatron_ttl.report.published import AGREES, COMPUTED, CUT_OFF, DIFFERS, PublishedRow, compare, read_published
from megatron_ttl.report.saturation import Point, Saturation, saturation

HEADER = ("figure", "printed", "ours", "verdict", "where", "note")
_AVERAGED = {
    "ttl_table4": ("arc", "hellaswag", "mmlu", "truthfulqa"),
    "ttl_table5": ("imdb", "faquad_nli", "hatebr", "assin2", "agnews"),
    "tinyllama_table2": ("hellaswag", "obqa", "winogrande", "arc_c", "arc_e", "boolq", "piqa"),
    "tinyllama_table3": ("mmlu_5shot", "bbh_3shot", "humaneval_0shot", "drop_3shot"),
}
_AWQ_GROUP = 128


@dataclass(frozen=True)
class Check:
    """A figure of a paper, and what computing it gives."""

    figure: str
    computed: float
    printed: Decimal | None
    """As it was printed, with its digits; None: nobody printed it."""
    source: str
    note: str = ""

    @property
    def verdict(self) -> str:
        """`agrees`, `cut off, not rounded`, `differs` or `not printed`."""
        return COMPUTED if self.printed is None else compare(self.printed, self.computed)


class Published:
    """The published tables of one folder, read when they are needed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._tables: dict[str, list[PublishedRow]] = {}

    def table(self, name: str) -> list[PublishedRow]:
        """Return the rows of a table."""
        if name not in self._tables:
            self._tables[name] = read_published(self._folder, name)
        return self._tables[name]

    def row(self, table: str, key: str, column: str = "model") -> PublishedRow:
        """Return the row of a table that has this in a column.

        Raises:
            DataError: there is none.
        """
        for row in self.table(table):
            if row[column] == key:
                return row
        raise DataError(f"{self._folder}/{table}.csv: has no row whose {column} is {key!r}; it must have one; "
                        "restore the file")

    def ttl(self, key: str) -> PublishedRow:
        """Return a figure of TeenyTinyLlama's text."""
        return self.row("ttl_text", key, "key")

    def tiny(self, key: str) -> PublishedRow:
        """Return a figure of TinyLlama's text."""
        return self.row("tinyllama_text", key, "key")


def paper_checks(folder: str | os.PathLike[str]) -> list[Check]:
    """Recompute every figure that follows from others.

    Raises:
        DataError: a table is missing or damaged.
    """
    published = Published(folder)
    parts: Sequence[Callable[[Published], Iterator[Check]]] = (
        _tokenizers, _sizes, _lengths, _scaling, _averages, _checkpoints, _energy_table, _energy_text, _generation,
        _tinyllama)
    return [check for part in parts for check in part(published)]


def print_checks(folder: str | os.PathLike[str], as_json: bool = False) -> None:
    """Print every check, those that do not agree first, and how many there are of each verdict.

    Raises:
        DataError: a table is missing or damaged.
    """
    order = (DIFFERS, CUT_OFF, AGREES, COMPUTED)
    checks = sorted(paper_checks(folder), key=lambda check: order.index(check.verdict))
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in order}
    if as_json:
        rows = [{"figure": check.figure, "printed": None if check.printed is None else float(check.printed),
                 "ours": check.computed, "verdict": check.verdict, "where": check.source, "note": check.note}
                for check in checks]
        print_result({"counts": counts, "checks": rows}, as_json=True)
        return
    print_table(HEADER, [(check.figure, "-" if check.printed is None else f"{check.printed:,f}", _like(check), check.verdict,
                          check.source, check.note) for check in checks],
                title="published figures, recomputed from published rows")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _like(check: Check) -> str:
    """Write our value with the digits of the printed one, and one more; at least four where nothing was printed."""
    if check.printed is None:
        return f"{check.computed:,.5g}" if abs(check.computed) < 1e5 else f"{check.computed:,.0f}"
    return f"{check.computed:,.{max(0, 1 - int(check.printed.as_tuple().exponent))}f}"


def _check(row: PublishedRow, column: str, figure: str, computed: float, note: str = "") -> Check:
    return Check(figure, computed, row.decimal(column), row["source"], note or row["note"])


def _unprinted(row: PublishedRow, figure: str, computed: float, note: str = "") -> Check:
    return Check(figure, computed, None, row["source"], note)


def _tokenizers(published: Published) -> Iterator[Check]:
    rows = published.table("ttl_table1")
    for row in rows:
        yield _unprinted(row, f"tokens per word, {row['tokenizer']}", row.number("tokens") / row.number("words"))
    ours, llama = (published.row("ttl_table1", name, "tokenizer").number("tokens") for name in ("TTL", "Sabiá-7B"))
    yield _check(published.ttl("tokenizer_improvement"), "value", "fewer tokens than Llama 2, %", 100 * (1 - ours / llama),
                 f"Llama 2 needs {llama / ours:.2f} times as many")


def _model(row: PublishedRow, heads: int | None = None, key_value_heads: int | None = None) -> ModelConfig:
    heads = heads or int(row.number("heads"))
    return ModelConfig(hidden_size=int(row.number("hidden_size")), intermediate_size=int(row.number("intermediate_size")),
                       num_hidden_layers=int(row.number("layers")), num_attention_heads=heads,
                       num_key_value_heads=key_value_heads or heads, vocab_size=int(row.number("vocabulary_size")),
                       max_position_embeddings=int(row.number("context_length")))


def _sizes(published: Published) -> Iterator[Check]:
    for row in published.table("ttl_table2"):
        yield _check(row, "parameters", f"parameters of {row['model']}", count_parameters(_model(row)),
                     "printed: the model's name")
    row, heads = published.row("tinyllama_table1", "TinyLlama-1.1B"), published.tiny("query_heads")
    key_value_heads = int(published.tiny("key_value_heads").number("value"))
    yield _check(row, "heads", "query heads of TinyLlama", heads.number("value"), f"{heads['source']} has {heads['value']}")
    for count, kept in ((32, key_value_heads), (16, 16), (16, key_value_heads)):
        yield _check(row, "parameters", f"parameters of TinyLlama with {count} heads, {kept} for keys and values",
                     count_parameters(_model(row, count, kept)))


def _lengths(published: Published) -> Iterator[Check]:
    step, steps = (published.row("ttl_table3", key, "setting") for key in ("tokens_per_batch", "training_steps"))
    context = published.row("ttl_table2", "TTL-160m").number("context_length")
    for model, column, epochs in (("160m", "ttl_160m", 1), ("460m", "ttl_460m", 2)):
        rows, at_once = published.ttl(f"rows_{model}").number("value"), step.number(column) / context
        taken = steps.number(column)
        yield _unprinted(steps, f"training tokens of TTL-{model}", taken * step.number(column))
        planned = float(rows * epochs // at_once)
        yield (_check(steps, column, f"steps of TTL-{model}, {epochs} epoch", planned) if epochs == 1 else
               _unprinted(steps, f"planned steps of TTL-{model}, {epochs} epochs", planned, "stopped after 1,200,000"))
        yield _unprinted(steps, f"epochs of TTL-{model}", taken * at_once / rows)
    parameters = 4.6e8
    optimum = published.ttl("tokens_per_parameter").number("value") * parameters
    yield _check(published.ttl("steps_past_optimum"), "value", "steps of TTL-460m past 20 tokens per parameter",
                 steps.number("ttl_460m") - optimum / step.number("ttl_460m"),
                 "for 460e6 parameters: 9.2e9 tokens, not 9.5e9")


def _scaling(published: Published) -> Iterator[Check]:
    constants = [published.ttl(f"law_{name}") for name in ("a", "b", "e", "alpha", "beta")]
    printed = ScalingLaw("as printed", *(row.number("value") for row in constants), source="")
    hoffmann = SCALING_LAWS["hoffmann-tex"]
    yield _check(constants[3], "value", "alpha of Hoffmann et al.", hoffmann.alpha)
    yield _check(constants[4], "value", "beta of Hoffmann et al.", hoffmann.beta)
    for key, parameters in (("160m", 160e6), ("460m", 460e6)):
        row = published.ttl(f"optimal_tokens_{key}")
        yield _check(row, "value", f"tokens of TTL-{key} at 20 per parameter",
                     published.ttl("tokens_per_parameter").number("value") * parameters,
                     "printed in millions; billions are meant")
    for parameters, tokens in ((160e6, 3.5e9), (460e6, 9.3e9), (460e6, 9.5e9)):
        yield _unprinted(constants[0], f"loss for {parameters:.3g} parameters, {tokens:.3g} tokens, as printed",
                         printed.loss(parameters, tokens))
    yield _check(published.ttl("predicted_perplexity_460m"), "value", "perplexity for 4.6e8 parameters, 9.3e9 tokens",
                 math.exp(printed.loss(460e6, 9.3e9)), "printed: base 2; a loss in nats wants e")
    seventy = published.ttl("chinchilla_tokens")
    yield _check(seventy, "value", "optimal tokens for 7e10 parameters, constants as printed", printed.optimal_tokens(70e9))
    sizes = [(row["model"], count_parameters(_model(row))) for row in published.table("ttl_table2")]
    tiny = published.row("tinyllama_table1", "TinyLlama-1.1B")
    kept = int(published.tiny("key_value_heads").number("value"))
    sizes.append((tiny["model"], count_parameters(_model(tiny, int(published.tiny("query_heads").number("value")), kept))))
    measured = {row["model"]: row for row in published.table("ttl_figure1b")}  # the last row of each
    for law in SCALING_LAWS.values():
        for model, parameters in sizes:
            yield Check(f"optimal tokens of {model}, {law.name}", law.optimal_tokens(parameters), None, law.source)
            if model in measured:
                row = measured[model]
                loss = law.loss(parameters, _trained(published, model))
                yield Check(f"loss of {model} at its end, {law.name}", loss, None, law.source,
                            f"measured {row['loss']}, with another tokenizer")


def _trained(published: Published, model: str) -> float:
    """Return the tokens that a TTL model was trained on."""
    column = model.lower().replace("-", "_")
    return math.prod(published.row("ttl_table3", key, "setting").number(column)
                     for key in ("tokens_per_batch", "training_steps"))


def _averages(published: Published) -> Iterator[Check]:
    for table, columns in _AVERAGED.items():
        for row in published.table(table):
            yield _check(row, "average", f"average of {row['model']}", fmean(map(row.number, columns)))
    row, columns = published.row("tinyllama_table2", "Pythia-1.0B"), _AVERAGED["tinyllama_table2"]
    boolq, arc = published.tiny("pythia_1b_boolq"), published.tiny("tinyllama_arc_c")
    others = [row.number(column) for column in columns if column != "boolq"]
    yield _check(row, "average", "average of Pythia-1.0B with BoolQ of the repository",
                 fmean([*others, boolq.number("value")]), f"{boolq['source']} has {boolq['value']}")
    implied = len(columns) * row.number("average") - sum(others)
    yield _check(row, "boolq", "BoolQ of Pythia-1.0B", boolq.number("value"), f"the printed average implies {implied:.2f}")
    yield _check(published.row("tinyllama_table2", "TinyLlama-1.1B"), "arc_c", "ARC-c of TinyLlama", arc.number("value"))


def _checkpoints(published: Published) -> Iterator[Check]:
    for row in published.table("ttl_figure1b"):
        yield _check(row, "loss", f"loss of {row['model']} at {row['steps']} steps", math.log(row.number("perplexity")),
                     "logarithm of the printed perplexity")
    rows = published.table("ttl_figure2")
    scores = [row.number("accuracy") for row in rows]
    mean, items = fmean(scores) / 100, rows[0].number("items")
    error = 100 * math.sqrt(mean * (1 - mean) / items)
    yield _unprinted(rows[0], "mean of the 13 checkpoints on ARC", 100 * mean)
    yield _unprinted(rows[0], "standard error of one checkpoint on ARC", error, f"{items:,.0f} questions")
    yield _unprinted(rows[0], "range of the checkpoints in standard errors", (max(scores) - min(scores)) / error)
    final = published.row("ttl_figure2", "1200000", "steps")
    yield Check("ARC of TTL-460m", final.number("accuracy"), published.row("ttl_table4", "TTL-460m").decimal("arc"),
                published.row("ttl_table4", "TTL-460m")["source"], "the last checkpoint of Figure 2")


def table6(published: Published) -> Saturation:
    """Look at Table 6 as at any run."""
    return saturation([Point(row.number("tokens"), math.log(row.number("perplexity")), row.number("kwh"),
                             row.number("kg_co2e")) for row in published.table("ttl_table6")])


def _energy_table(published: Published) -> Iterator[Check]:
    rows = published.table("ttl_table6")
    per_step = published.row("ttl_table3", "tokens_per_batch", "setting").number("ttl_460m")
    for row in rows:
        yield _check(row, "tokens_printed", f"tokens of TTL-460m at {row['steps']} steps", row.number("steps") * per_step)
    found = table6(published)
    yield _check(published.ttl("second_half_perplexity"), "value", "perplexity bought by the second half",
                 found.latter.perplexity)
    for name, stretch in (("first row to the half", found.former), ("second half", found.latter)):
        yield _unprinted(rows[0], f"kWh, {name}", stretch.kwh or math.nan, f"{stretch.perplexity:.2f} perplexity")
        yield _unprinted(rows[0], f"kWh per 0.01 nat, {name}", stretch.kwh_per_centinat or math.nan)
    assert found.slope is not None
    yield _unprinted(rows[0], "nats per decade of tokens, second half", found.slope.per_decade,
                     f"{found.slope.verdict}: 95% interval {found.slope.low:.3f} to {found.slope.high:.3f}")
    yield _unprinted(rows[-1], "kg CO2e per kWh, last row of Table 6", rows[-1].number("kg_co2e") / rows[-1].number("kwh"))
    yield _check(published.ttl("kwh_460m"), "value", "kWh of TTL-460m by Table 6", rows[-1].number("kwh"),
                 "the two places of the paper do not agree")


def _energy_text(published: Published) -> Iterator[Check]:
    per_hour = 3600
    for model in ("160m", "460m"):
        seconds = published.ttl(f"seconds_{model}")
        yield _check(published.ttl(f"hours_{model}"), "value", f"hours of TTL-{model} by the log",
                     seconds.number("value") / per_hour)
        yield _unprinted(seconds, f"mean tokens per second of TTL-{model}",
                         _trained(published, f"TTL-{model}") / seconds.number("value"))
    for key in ("kwh_460m", "kg_460m"):
        yield _check(published.ttl(key), "value", f"{key.replace('_', ' of TTL-')} by the log",
                     published.ttl(f"{key}_log").number("value"))
    for name in ("160m", "460m", "chat"):
        kwh, kg = published.ttl(f"kwh_{name}"), published.ttl(f"kg_{name}")
        yield _unprinted(kwh, f"kg CO2e per kWh, TTL-{name}", kg.number("value") / kwh.number("value"),
                         "another electricity than the others'" if name == "chat" else "")
    per_step = published.row("ttl_table3", "tokens_per_batch", "setting").number("ttl_160m")
    yield _check(published.ttl("peak_throughput"), "value", "peak tokens per second",
                 published.ttl("steps_per_second").number("value") * per_step)


def _generation(published: Published) -> Iterator[Check]:
    row = published.row("ttl_table1", "TTL", "tokenizer")
    fertility = row.number("tokens") / row.number("words")
    yield _check(published.ttl("words_per_second_a100"), "value", "words per second on an A100",
                 published.ttl("tokens_per_second_a100").number("value") / fertility, "a word takes more than one token")
    model = _model(published.row("ttl_table2", "TTL-460m"))
    quantized = count_parameters(model) - 2 * embedding_parameters(model) - norm_parameters(model)
    groups, half = quantized / _AWQ_GROUP, 2
    size = quantized / 2 + half * groups + groups / 2 + half * (2 * embedding_parameters(model) + norm_parameters(model))
    yield _check(published.ttl("awq_megabytes"), "value", "MB of TTL-460m in 4 bits", size / 1e6,
                 "4-bit matrices, a 16-bit scale and a 4-bit zero per 128, embedding, head and norms in 16 bits")


def _tinyllama(published: Published) -> Iterator[Check]:
    speed = published.tiny("throughput").number("value")
    row = published.row("tinyllama_figure1", "TinyLlama-1.1B")
    yield _check(row, "gpu_hours", "GPU hours of TinyLlama for 3e11 tokens", row.number("tokens") / speed / 3600,
                 "at 24,000 tokens a second")
    row = published.row("tinyllama_figure1", "MPT-1.3B")
    gpus, hours, tokens = (published.tiny(f"mpt_{name}").number("value") for name in ("gpus", "hours", "tokens"))
    yield _check(row, "gpu_hours", "GPU hours of MPT-1.3B for 3e11 tokens", gpus * hours / tokens * row.number("tokens"))
    whole = published.tiny("training_tokens")
    yield _check(published.tiny("days"), "value", "days of TinyLlama's training",
                 whole.number("value") / (speed * published.tiny("gpus").number("value") * 86400))
    yield _check(published.tiny("abstract_tokens"), "value", "tokens of TinyLlama, three epochs",
                 published.tiny("epochs").number("value") * published.tiny("data_tokens").number("value"),
                 "the data were 950e9 tokens")
    last, before = published.row("tinyllama_table2", "TinyLlama-1.1B"), published.tiny("average_at_2.5e12")
    columns = _AVERAGED["tinyllama_table2"]
    yield _unprinted(before, "average of TinyLlama at 3e12 tokens, less that at 2.5e12",
                     fmean(map(last.number, columns)) - before.number("value"), "worse, for BoolQ")

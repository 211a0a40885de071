"""The rows of a grid put in relation: speed-ups against vanilla fp32, equality of the loss, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ttl.bench.figures import markdown_line
from megatron_ttl.bench.grid_cells import VANILLA, Cell, cell_of
from megatron_ttl.files import human_bytes

_HEADER = ("model", "precision", "attention", "optimizer", "micro batch", "recompute", "compiled", "engine", "graphs",
           "data", "tokens/s", "training x", "evaluation tokens/s", "evaluation x", "MFU", "peak memory", "J/token", "loss",
           "loss - fp32", "note")


def with_ratios(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None,
                tolerance: float) -> list[dict[str, Any]]:
    """Add to every row its speed-ups against vanilla, its loss less the reference's, and whether that is nothing."""
    vanilla = next((row for row in rows if _is_vanilla(cell_of(row["cell"])) and row["status"] == "measured"), {})
    expected = (reference or {}).get("loss")
    found = []
    for row in rows:
        loss = row.get("loss")
        difference = None if loss is None or expected is None else loss - expected
        found.append({**row, "training_speed_up": _ratio(row, vanilla, "tokens_per_s"),
                      "evaluation_speed_up": _ratio(row, vanilla, "evaluation_tokens_per_s"),
                      "loss_difference": difference,
                      "equal_loss": difference is not None and abs(difference) <= tolerance})
    return found


def _is_vanilla(cell: Cell) -> bool:
    return (cell.model, cell.precision, cell.attention) == (VANILLA.model, VANILLA.precision, VANILLA.attention)


def _ratio(row: Mapping[str, Any], vanilla: Mapping[str, Any], key: str) -> float | None:
    own, theirs = row.get(key), vanilla.get(key)
    return own / theirs if own and theirs else None


def fastest_equal(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the fastest row of ours whose loss is the reference's; tf32 is no setting of a profile."""
    able = [row for row in rows if row["status"] == "measured" and row["equal_loss"] and row["cell"]["model"] == "ours"
            and row["cell"]["precision"] != "tf32"]
    return max(able, key=lambda row: row["tokens_per_s"], default=None)


def grid_table(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], tolerance: float) -> str:
    """Return the whole table in Markdown, what is and what is not, after the two ratios that the TTL paper tells."""
    terms = (f"torch {facts['torch']}; median of {facts['steps']} steps; ratios against vanilla: Hugging Face's Llama in "
             "fp32 without tf32, attention written out. Evaluation is the forward pass with its loss.")
    lines = [f"# How fast the same steps are on {facts['device']}", "", terms, "",
             f"- {_sentence('Fastest of ours', facts['training_speed_up'], facts['evaluation_speed_up'])}",
             f"- {_sentence(*_published(rows))}",
             f"- A loss counts as equal within {tolerance:g} nats of ours in fp32 after the same steps.", "",
             markdown_line(_HEADER), markdown_line(["---"] * len(_HEADER))]
    return "\n".join([*lines, *(markdown_line(_cells(row)) for row in rows)]) + "\n"


def _published(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float | None, float | None]:
    """Return the contrast that the paper reports: Hugging Face's own Llama in its fastest row."""
    able = [row for row in rows if row["status"] == "measured" and row["cell"]["model"] == "hf" and row["training_speed_up"]]
    best = max(able, key=lambda row: row["tokens_per_s"], default=None)
    name = "Fastest of Hugging Face's (the paper: 3x in training, 6x in evaluation)"
    return (name, best["training_speed_up"], best["evaluation_speed_up"]) if best else (name, None, None)


def _sentence(name: str, training: float | None, evaluation: float | None) -> str:
    if training is None or evaluation is None:
        return f"{name}: not measured"
    return f"{name}: {training:.2f}x in training, {evaluation:.2f}x in evaluation"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cell = list(map(str, row["cell"].values()))
    if row["status"] != "measured":
        return [*cell, *[""] * 9, f"{row['status']}: {row['reason']}"]
    figures = (("tokens_per_s", "{:,.0f}"), ("training_speed_up", "{:.2f}"), ("evaluation_tokens_per_s", "{:,.0f}"),
               ("evaluation_speed_up", "{:.2f}"), ("mfu", "{:.1%}"), ("peak_memory_bytes", None),
               ("joules_per_token", "{:.3g}"), ("loss", "{:.5f}"), ("loss_difference", "{:+.5f}"))
    shown = ["" if row[key] is None else human_bytes(row[key]) if form is None else form.format(row[key])
             for key, form in figures]
    notes = [row.get("note") or "", "" if row["joules_per_token"] is not None else f"energy {row['energy']}",
             "" if row["equal_loss"] else "loss not equal"]
    return [*cell, *shown, "; ".join(filter(None, notes))]

"""The funnel report: how much of each source each rule took, with examples; as JSON and as one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ttl.data.corpus.clean import UNREADABLE
from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.settings import CorpusFile
from megatron_ttl.data.corpus.tally import Amount, Examples, Tally, difference, excerpt

_DEDUP_STAGE = 100  # after those of clean.py


class Funnel:
    """Adds up what became of all documents."""

    def __init__(self, settings: CorpusFile, clusters: Mapping[str, Any] | None) -> None:
        self._settings = settings
        self._clusters = clusters
        self._tallies = {source.name: Tally() for source in settings.source}
        corpus = settings.corpus
        self._dropped = Examples(corpus.examples, corpus.seed)
        self._changed = Examples(corpus.examples, corpus.seed)

    def add_unit(self, record: Mapping[str, Any]) -> None:
        """Add the record of a cleaned unit."""
        self._tallies[record["source"]].merge(record["tally"])
        self._changed.merge(record["changes"])

    def show(self, entry: Mapping[str, Any]) -> None:
        """Offer an entry of a list of dropped documents as an example."""
        if entry["rule"] == UNREADABLE:
            id_ = f"{entry['file']}:{entry['line']}"
            shown = {"id": id_, "value": entry["value"], "text": excerpt(entry["raw"])}
        else:
            id_ = entry["id"]
            shown = {"id": id_, "value": entry["value"], "limit": entry["limit"], "text": excerpt(entry["text"])}
        if self._dropped.wants(entry["rule"], id_):
            self._dropped.add(entry["rule"], id_, shown)

    def lose(self, source: str, entry: Mapping[str, Any]) -> None:
        """Count a document that was clean and is a copy."""
        tally, size = self._tallies[source], len(entry["text"].encode("utf-8"))
        tokens = entry["notes"].get("tokens", 0)
        tally.kept.add(-1, -size, -tokens)
        tally.lose(entry["rule"], _DEDUP_STAGE, size, tokens)
        self.show(entry)

    def change(self, source: str, before: Document, after: Document) -> None:
        """Count a document from which repeated paragraphs were taken."""
        went = len(before.text.encode("utf-8")) - len(after.text.encode("utf-8"))
        tokens = before.notes.get("tokens", 0) - after.notes.get("tokens", 0)
        tally = self._tallies[source]
        tally.kept.add(0, -went, -tokens)
        tally.change("paragraphs", went, tokens)
        if self._changed.wants("paragraphs", before.id):
            self._changed.add("paragraphs", before.id, {"id": before.id, **difference(before.text, after.text)})

    def report(self) -> dict[str, Any]:
        """Return the whole report; its sums are checked."""
        total = Tally()
        for tally in self._tallies.values():
            assert tally.rows == tally.blank + tally.unreadable.total() + tally.read.documents, "every row is counted once"
            for part in ("documents", "bytes", "tokens"):
                gone = sum(getattr(amount, part) for amount in tally.lost.values())
                changed = sum(getattr(amount, part) for amount in tally.changed.values()) if part != "documents" else 0
                assert getattr(tally.read, part) == getattr(tally.kept, part) + gone + changed, f"{part} are counted once"
            total.merge(tally.to_json())
        examples = self._dropped.to_json()
        return {
            "rows": total.rows, "blank": total.blank, "unreadable": total.unreadable.total(),
            "read": _amount(total.read), "kept": _amount(total.kept),
            "rules": [{"rule": rule, **_amount(total.lost[rule]), "examples": examples.get(rule, [])}
                      for rule in total.rules()],
            "unreadable_examples": examples.get(UNREADABLE, []),
            "changes": [{"step": step, **_amount(amount), "examples": self._changed.to_json().get(step, [])}
                        for step, amount in total.changed.items()],
            "sources": [self._source(number) for number in range(len(self._settings.source))],
            "duplicates": self._clusters,
        }

    def _source(self, number: int) -> dict[str, Any]:
        source = self._settings.source[number]
        tally = self._tallies[source.name]
        return {
            "source": source.name, "license": source.license, "rows": tally.rows, "blank": tally.blank,
            "unreadable": dict(sorted(tally.unreadable.items())), "read": _amount(tally.read), "kept": _amount(tally.kept),
            "lost": {rule: _amount(tally.lost[rule]) for rule in tally.rules()},
            "changed": {step: _amount(amount) for step, amount in tally.changed.items()},
            "where": {"keep": list(source.keep_where), "drop": list(source.drop_where),
                      "documents_without_the_field": dict(sorted(tally.unknown.items()))},
        }

    def page(self, report: Mapping[str, Any]) -> str:
        """Return the report as one page of Markdown; its examples are in the JSON."""
        with_tokens = self._settings.corpus.tokenizer is not None
        sources = report["sources"]
        lines = [
            "# Funnel", "",
            f"{report['kept']['documents']:,} of {report['read']['documents']:,} documents stay, "
            f"{_share(report['kept']['bytes'], report['read']['bytes'])} of the bytes"
            + (f", {report['kept']['tokens']:,} tokens" if with_tokens else "") + ". "
            f"{report['rows']:,} rows were read, {report['blank']:,} blank, {report['unreadable']:,} unreadable.", "",
            *_table(["source", "licence", "read", "kept", "kept", "kept bytes", *(["kept tokens"] if with_tokens else [])], [
                [entry["source"], entry["license"], f"{entry['read']['documents']:,}", f"{entry['kept']['documents']:,}",
                 _share(entry["kept"]["documents"], entry["read"]["documents"]), f"{entry['kept']['bytes']:,}",
                 *([f"{entry['kept']['tokens']:,}"] if with_tokens else [])] for entry in sources]),
            "", "Lost, in the order of the stages:", "",
            *_table(["rule", "documents", "of read", "bytes", *(["tokens"] if with_tokens else []), "most from"], [
                [f"`{rule['rule']}`", f"{rule['documents']:,}", _share(rule["documents"], report["read"]["documents"]),
                 f"{rule['bytes']:,}", *([f"{rule['tokens']:,}"] if with_tokens else []), _most_from(rule["rule"], sources)]
                for rule in report["rules"]]),
        ]
        if report["changes"]:
            lines += ["", "Changed:", "", *_table(["step", "documents", "bytes taken away"], [
                [f"`{change['step']}`", f"{change['documents']:,}", f"{change['bytes']:,}"]
                for change in report["changes"]])]
        where = [[entry["source"], f"`{kind}_where.{number}`", f"`{text}`"] for entry in sources for kind in ("keep", "drop")
                 for number, text in enumerate(entry["where"][kind], 1)]
        if where:
            lines += ["", "Predicates:", "", *_table(["source", "rule", "predicate"], where)]
        unknown = [(entry["source"], text, count) for entry in sources
                   for text, count in entry["where"]["documents_without_the_field"].items()]
        if unknown:
            lines += ["", "Predicates on fields that documents do not have (false for these):", "",
                      *_table(["source", "predicate", "documents"], [[name, f"`{text}`", f"{count:,}"]
                                                                     for name, text, count in unknown])]
        lines += ["", "`report.json` has all numbers by rule and source, and examples; `dropped/` has all that was dropped.",
                  ""]
        return "\n".join(lines)


def _amount(amount: Amount) -> dict[str, int]:
    return {"documents": amount.documents, "bytes": amount.bytes, "tokens": amount.tokens}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _most_from(rule: str, sources: Iterable[Mapping[str, Any]]) -> str:
    losses = sorted(((entry["lost"][rule]["documents"], entry["source"]) for entry in sources if rule in entry["lost"]),
                    reverse=True)
    return ", ".join(f"{source} {count:,}" for count, source in losses[:3])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in
            (header, ["---"] * len(header), *rows)]

"""Compose a corpus of original documents in Brazilian Portuguese from the hand-written grammar/*.toml.

The output holds the documents of documents.jsonl first, each once, then composed ones, no two alike.

How a template is written:
    [one|two|]         one of the alternatives, which may hold anything a template may hold
    {list}             a random entry of a list, itself a template, that this document has not used
    {x=list}           the same, kept under the name x and not printed
    {x} {x*} {x.field} what x holds; its plural; a field of its record
    {y=x.field}        an entry of a field that is a list
    {cansado:x}        a determiner, pronoun or adjective agreeing with x; {cansado:x*} agrees with its plural
    {ele/ela:x}        the first or the second, by the gender of x
    {mood~x}           a random adjective of the list mood, agreeing with x
    {n=int 2 9} {m=n * 4}  numbers: drawn, computed (+ - * / %); {n} digits, {n#} words, {n#x} words and noun
    {d=date} {t=clock} {s=sorted a b c} {v=present verb} {v=past verb} {v=length x} {v=initial x}
A single line break is a space (except before a dash), an empty line starts a paragraph, " // " breaks a line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from portuguese import FORMS, conjugate, fold, inflect, join, pluralise, spell  # noqa: E402

MONTHS = "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro".split()
WEEKDAYS = "segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo".split()
MOST_DOCUMENTS = 1_000_000
MOST_ATTEMPTS = 100


@dataclass(frozen=True)
class Word:
    """What a name in a document holds: a noun with its gender and its record, a phrase or a number."""

    text: str
    gender: str = "m"
    plural: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    number: int | None = None


def read_word(entry: str, **fields: Any) -> Word:
    """Read "a mão/mãos": the article gives the gender; a plural after the slash is for exceptions."""
    singular, _, plural = entry.strip().partition("/")
    article, _, noun = singular.partition(" ")
    if article not in ("o", "a") or not noun:
        return Word(singular, plural=plural or pluralise(singular), fields=fields)
    plural = plural or fields.get("plural", "") or pluralise(noun)
    return Word(noun, "f" if article == "a" else "m", plural, fields)


@cache
def parse(template: str) -> tuple[Any, ...]:
    """Cut a template into text (str), `("slot", expression)` and `("choice", alternatives)`."""
    parts, depth, start, bars = [], 0, 0, []
    for match in re.finditer(r"[\[\]|]|\{[^{}]*\}", template):
        mark, at = match.group(), match.start()
        if depth == 0 and mark != "|":
            assert mark != "]", f"a bracket closes that was never opened: {template}"
            parts.append(template[start:at])
            start = match.end()
        if mark[0] == "{" and depth == 0:
            parts.append(("slot", mark[1:-1]))
        elif mark == "[":
            bars = [at] if depth == 0 else bars
            depth += 1
        elif mark == "|" and depth == 1:
            bars.append(at)
        elif mark == "]":
            depth -= 1
            if depth == 0:
                edges = [*bars, at]
                choices = tuple(parse(template[a + 1:b]) for a, b in zip(edges, edges[1:], strict=False))
                parts.append(("choice", choices))
                start = match.end()
    assert depth == 0, f"a bracket is never closed: {template}"
    return (*parts, template[start:])


@cache
def read_grammar() -> tuple[dict[str, list[Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Read grammar/*.toml: lists by name, kinds of documents, and the hand-written documents."""
    lists: dict[str, list[Any]] = {}
    kinds: list[dict[str, Any]] = []
    for path in sorted((FOLDER / "grammar").glob("*.toml")):
        for name, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if name == "document":
                kinds += value
                continue
            assert name not in lists, f"{path.name}: the list {name} is written twice"
            if isinstance(value, str):
                lists[name] = [read_word(entry) for entry in value.split(",")]
            else:
                lists[name] = [v if isinstance(v, str) else read_word(v["nome"], **v) for v in value]
                lists |= {f"{w.text}.{key}": items for w in lists[name] if isinstance(w, Word)
                          for key, items in w.fields.items() if isinstance(items, list)}
    lines = (FOLDER / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return lists, kinds, [json.loads(line) for line in lines]


class Composer:
    """One document in the making: its random numbers, its names and what it has used already."""

    def __init__(self, rng: Random, lists: dict[str, list[Any]]) -> None:
        self.rng, self.lists = rng, lists
        self.names: dict[str, Word] = {}
        self.used: set[tuple[str, int]] = set()

    def below(self, count: int) -> int:
        """Draw from range(count); only Random.random is used, whose values no Python version changes."""
        return int(self.rng.random() * count)

    def draw(self, name: str) -> Word:
        """Draw an entry of a list that this document has not used; start over when all are used."""
        entries = self.lists[name]
        free = [i for i in range(len(entries)) if (name, i) not in self.used] or range(len(entries))
        index = free[self.below(len(free))]
        self.used.add((name, index))
        entry = entries[index]
        return Word(self.render(entry)) if isinstance(entry, str) else entry

    def render(self, template: str) -> str:
        """Write a template out."""
        return self.join_parts(parse(template))

    def join_parts(self, parts: tuple[Any, ...]) -> str:
        """Write the parts of a parsed template out, from left to right."""
        out = []
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            elif part[0] == "slot":
                out.append(self.slot(part[1]))
            else:
                out.append(self.join_parts(part[1][self.below(len(part[1]))]))
        return "".join(out)

    def slot(self, expression: str) -> str:
        """Write one `{expression}` out."""
        if "=" in expression:
            name, _, value = expression.partition("=")
            assert name not in FORMS, f"{name} is a word that agrees, it cannot be a name"
            self.names[name] = self.value(value)
            return ""
        if "~" in expression:
            name, _, owner = expression.partition("~")
            return self.agree(self.draw(name).text, owner)
        if ":" in expression:
            word, _, owner = expression.partition(":")
            return self.agree(self.names[word].text if word in self.names else word, owner)
        if "#" in expression:
            name, _, noun = expression.partition("#")
            number, word = self.names[name].number, self.names.get(noun, Word(""))
            return f"{spell(number, word.gender)} {word.text if number == 1 else word.plural}".strip()
        name, _, key = expression.rstrip("*").partition(".")
        word = self.names[name] if name in self.names else self.draw(name)
        if key:
            return self.render(word.fields[key])
        return word.plural if expression.endswith("*") else word.text

    def agree(self, word: str, owner: str) -> str:
        """Inflect `word` for the noun that the name `owner` holds, for its plural where a star follows."""
        return inflect(word, self.names[owner.rstrip("*")].gender, owner.endswith("*"))

    def value(self, expression: str) -> Word:
        """Compute what stands right of the equals sign."""
        head, *rest = expression.split()
        if len(rest) == 2 and rest[0] in "+-*/%":
            a, b = (int(t) if t.isdigit() else self.names[t].number for t in (head, rest[1]))
            return number({"+": a + b, "-": a - b, "*": a * b, "/": a // b, "%": a % b}[rest[0]])
        if head == "int":
            low, high = (int(t) if t.isdigit() else self.names[t].number for t in rest)
            return number(low + self.below(high - low + 1))
        if head == "date":
            return self.draw_date()
        if head == "clock":
            return Word(f"{7 + self.below(15)}h" + ("", "15", "30", "45")[self.below(4)])
        if head == "sorted":
            return Word(join(sorted((self.names[t].text for t in rest), key=fold)))
        if head in ("present", "past"):
            return Word(conjugate(self.names[rest[0]].text, head))
        if head == "length":
            return number(sum(map(str.isalpha, self.names[rest[0]].text)))
        if head == "initial":
            return Word(self.names[rest[0]].text[0].upper())
        key = head.partition(".")[2]
        if key:  # an entry of a record's list: drawn without repetition, like those of any other list
            word = self.names[head.partition(".")[0]]
            return self.draw(f"{word.text}.{key}")
        return self.draw(head)

    def draw_date(self) -> Word:
        """Draw a day between 1990 and 2025 and say on which day of the week it fell."""
        day = date.fromordinal(date(1990, 1, 1).toordinal() + self.below(36 * 365))
        weekday = WEEKDAYS[day.weekday()]
        number_of_day = "1º" if day.day == 1 else str(day.day)
        fields = {"dia": number_of_day, "mes": MONTHS[day.month - 1], "ano": str(day.year), "semana": weekday,
                  "na": ("no " if day.weekday() > 4 else "na ") + weekday}
        return Word(f"{number_of_day} de {MONTHS[day.month - 1]} de {day.year}", fields=fields)


def number(value: int) -> Word:
    """Return a name's value for a number."""
    return Word(str(value), plural=str(value), number=value)


def tidy(text: str) -> str:
    """Join lines into paragraphs, drop what empty alternatives leave behind and capitalise the sentences."""
    paragraphs = [re.sub(r"\s*\n\s*(?!—)", " ", p.strip()) for p in re.split(r"\n\s*\n", text)]
    text = "\n\n".join(p for p in paragraphs if p)
    text = re.sub(r" *// *", "\n", text)
    text = re.sub(r" +", " ", text)
    text = re.sub(r" ([,.;:!?](?:\s|$))", r"\1", text)
    text = re.sub(r" *\n *", "\n", text)
    starts = r"(^(?:— )?|[.!?]”? “?|\n(?:— )?|\. — |: “)([a-zà-ÿ])"
    return re.sub(starts, lambda m: m.group(1) + m.group(2).upper(), text)


def compose_one(seed: int, index: int, attempt: int) -> dict[str, str]:
    """Compose document `index`; `attempt` gives another one where it came out equal to an earlier one."""
    lists, kinds, _ = read_grammar()
    composer = Composer(Random(f"{seed}:{index}:{attempt}"), lists)
    pick = composer.rng.random() * sum(kind["weight"] for kind in kinds)
    for kind in kinds:
        pick -= kind["weight"]
        if pick < 0:
            break
    text = tidy(composer.render(kind["text"]))
    return {"id": f"composed-{index:07d}", "genre": kind["genre"], "text": text}


def compose(documents: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield the hand-written documents, then composed ones up to `documents`; no two have the same text."""
    written = read_grammar()[2]
    yield from written
    seen = {sha256(document["text"].encode()).digest()[:12] for document in written}
    for index in range(documents - len(written)):
        for attempt in range(MOST_ATTEMPTS):
            document = compose_one(seed, index, attempt)
            mark = sha256(document["text"].encode()).digest()[:12]
            if mark not in seen:
                break
        assert mark not in seen, "the grammar has run out of different documents"
        seen.add(mark)
        yield document


def main() -> None:
    """Parse, compose, write, say what was written."""
    parser = argparse.ArgumentParser(description="Compose original documents in Brazilian Portuguese.")
    parser.add_argument("--documents", type=int, default=12000, help="how many in all")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same bytes")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from megatron_ttl.console import print_result, progress
    from megatron_ttl.errors import UserError, raise_faults
    from megatron_ttl.files import atomic_write

    written, faults = len(read_grammar()[2]), []
    if not written <= args.documents <= MOST_DOCUMENTS:
        faults.append(f"--documents: {args.documents}; must be between {written} (all those written by hand) "
                      f"and {MOST_DOCUMENTS}; choose a number in between")
    if not 0 <= args.seed < 2**63:
        faults.append(f"--seed: {args.seed}; must be between 0 and 2^63 - 1; choose a number in between")
    if args.output.suffix != ".jsonl" or args.output.is_dir():
        faults.append(f"--output: {args.output}; must be a file that ends in .jsonl; give such a name")
    raise_faults(UserError, faults)
    started, text_bytes = time.monotonic(), 0
    with atomic_write(args.output) as handle, progress("composing", args.documents, "documents") as done:
        for count, document in enumerate(compose(args.documents, args.seed), start=1):
            text_bytes += len(document["text"].encode())
            handle.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
            if count % 256 == 0:
                done(count)
    print_result({"output": str(args.output), "documents": args.documents, "text_bytes": text_bytes,
                  "seed": args.seed, "elapsed_s": round(time.monotonic() - started, 2)}, args.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool
    run_tool(main)

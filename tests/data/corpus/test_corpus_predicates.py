"""Predicates: what they say of a document, what they say where a field is missing, and how they must be written."""

from __future__ import annotations

import pytest

from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.predicates import parse_predicate

DOCUMENT = Document("um texto", "web", "CC0", "raw/a.jsonl", 7, {
    "set": "Github", "stars": 3, "score": 0.5, "ok": True, "none": None, "url host": "a.br", "tags": ["x"], "in": 1,
    "exists": 2, "a": {"b": {"c-d": "ção"}}, "text3": "3"}, {"toxicity": 0.25, "language": {"pt": 0.98}})

TRUE = ['meta.set == "Github"', 'meta.set=="Github"', 'meta.set != "Web"', "meta.stars == 3", "meta.stars == 3.0",
        "meta.stars >= 3", "meta.stars > 2.5", "meta.stars < 4", "meta.stars <= 3", "meta.ok == true", "meta.none == null",
        'meta."url host" == "a.br"', 'meta.a.b.c-d == "ção"', 'meta.set in ["Web", "Github"]', "meta.stars in [1, 3]",
        "meta.set exists", "meta.none exists", "meta.in == 1", "meta.exists == 2", "meta.exists exists", 'meta.set < "Web"',
        "notes.toxicity < 0.5", "notes.language.pt >= 0.98", 'license == "CC0"', 'file == "raw/a.jsonl"', 'source != "chat"',
        "meta.ok != 1", 'meta.text3 != 3', "meta.none != 0"]
FALSE = ['meta.set == "github"', 'meta.set != "Github"', "meta.stars > 3", "meta.ok == 1", "meta.stars == true",
         'meta.text3 == 3', 'meta.set in ["Web"]', "meta.stars in [true, \"3\"]", "meta.other exists", "meta.a.x exists",
         'meta.tags == "x"', "notes.toxicity >= 0.5"]
UNKNOWN = ["meta.other == 1", "meta.other != 1", "meta.set.deeper == 1", "notes.paragraphs > 1", "meta.set < 3",
           "meta.stars < \"3\"", "meta.tags > 1", "meta.ok < 2", "meta.none < 2", "meta.other in [1]"]


@pytest.mark.parametrize(("texts", "holds"), [(TRUE, True), (FALSE, False), (UNKNOWN, None)])
def test_what_a_predicate_says(texts, holds):
    assert {text: parse_predicate(text).holds(DOCUMENT) for text in texts} == dict.fromkeys(texts, holds)


REFUSED = {
    'meta.set = "x"': "must be a field, an operator and a value", "": "must be a field, an operator and a value",
    "meta.set": "must be a field", "meta. == 3": "must be a field", "set == 3": "is about `set`; must be about meta.<key>",
    "meta == 3": "is about `meta`", "license.x == 3": "is about `license.x`", "text == \"a\"": "is about `text`",
    "meta.x == 'a'": "must have a number, true, false, null, or a text in double quotes",
    "meta.x == Github": "quote it as JSON",
    "meta.x ==": "has the value ``", "meta.x == 3 or meta.y == 2": "has the value `3 or meta.y == 2`",
    "meta.x in 3": "must have a list after in", "meta.x in []": "must have a list after in",
    "meta.x == [1]": "must have plain values",
    "meta.x in [[1]]": "must have plain values", "meta.x exists 3": "must end there",
    "meta.x < true": "must be a number or a text",
    "meta.x < null": "use == or !=", "__import__('os') == 1": "must be a field",
    "meta.x == __import__('os')": "has the value",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_predicate(text):
    fault = parse_predicate(text)
    assert isinstance(fault, str) and REFUSED[text] in fault and fault.count(";") == 2


def test_what_was_measured():
    assert parse_predicate("meta.stars > 9").measured(DOCUMENT) == 3
    assert parse_predicate("meta.other == 9").measured(DOCUMENT) == "absent"
    assert parse_predicate("meta.tags == 9").measured(DOCUMENT) == '["x"]'
    assert parse_predicate("notes.toxicity > 1").reads_notes and not parse_predicate("meta.x > 1").reads_notes

"""What is a duplicate, which copy stays, and what the report says."""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from corpus_shards import folder_bytes, write_shards
from pydantic import ValidationError

from megatron_ttl.data.corpus import sorted_keys
from megatron_ttl.data.corpus.dedup import DedupResult, DedupSettings, find_duplicates
from megatron_ttl.data.corpus.document import Document, Dropped
from megatron_ttl.errors import DataError

STORY = ("Era uma vez uma menina que morava à beira do rio e não sabia nadar, mas todos os dias ia até a margem ver "
         "os barcos que subiam carregados de farinha, peixe e notícias da cidade grande.")


def dropped(result: DedupResult, shards: int) -> dict[tuple[int, int], tuple[str, object]]:
    """Return rule and value of every dropped document by shard and line."""
    return {(shard, line): tuple(decision.dropped[:2]) for shard in range(shards)
            for line, decision in result.of_shard(shard).items() if decision.dropped}


def test_copies_are_found_through_case_blanks_and_composition(tmp_path):
    other = STORY.replace(",", ";")  # punctuation is text for the exact rule, and nothing for the near one
    shards = write_shards(tmp_path / "in", [
        [STORY, "Outra coisa.", unicodedata.normalize("NFD", STORY.upper())],
        [f"\n  {STORY.replace(' ', '  ')}\t", other, "outra  coisa."]])
    result = find_duplicates(shards, DedupSettings(near=False), tmp_path / "exact", 1)
    first = "a/0:1"
    assert dropped(result, 2) == {(0, 3): ("dedup.exact", first), (1, 1): ("dedup.exact", first),
                                  (1, 3): ("dedup.exact", "a/0:2")}
    result = find_duplicates(shards, DedupSettings(), tmp_path / "near", 1)
    assert dropped(result, 2)[1, 2] == ("dedup.near", first) and result.report["dropped"]["dedup.exact"] == 3
    result = find_duplicates(shards, DedupSettings(exact=False), tmp_path / "only_near", 1)
    assert set(dropped(result, 2)) == {(0, 3), (1, 1), (1, 2)}, "short documents are compared exactly alone"
    everything_off = DedupSettings(exact=False, near=False, paragraphs=False)
    assert not dropped(find_duplicates(shards, everything_off, tmp_path / "off", 1), 2)


def test_the_first_stays_or_that_of_the_preferred_source(tmp_path):
    near = STORY.replace("farinha", "milho")
    shards = write_shards(tmp_path / "in", [[("web", STORY), ("web", near)], [("wiki", near), ("livros", STORY)]])
    stays = {}
    for name, prefer in (("input", ()), ("wiki", ("wiki",)), ("livros", ("nada", "livros", "wiki"))):
        settings = DedupSettings(prefer=prefer, bands=16, rows=2)
        result = find_duplicates(shards, settings, tmp_path / name, 1)
        found = dropped(result, 2)
        stays[name] = {identifier for _, identifier in found.values()}
        assert len(found) == 3 and result.report["kept"] == 1
        assert sorted(rule for rule, _ in found.values()) == ["dedup.exact", "dedup.exact", "dedup.near"]
    assert stays == {"input": {"web/0:1"}, "wiki": {"wiki/1:1"}, "livros": {"livros/1:2"}}


def test_a_minimum_of_similarity_parts_what_only_shares_a_band(tmp_path):
    draw = random.Random(5)
    words = [f"palavra{draw.randrange(10**9)}" for _ in range(400)]
    close, half = [*words[:390], *reversed(words[390:])], [*words[:270], *(f"outra{n}" for n in range(130))]
    shards = write_shards(tmp_path / "in", [[" ".join(text) for text in (words, close, half, reversed(half))]])
    loose = find_duplicates(shards, DedupSettings(bands=16, rows=1), tmp_path / "loose", 1)
    strict = find_duplicates(shards, DedupSettings(bands=16, rows=1, min_similarity=0.8), tmp_path / "strict", 1)
    assert set(dropped(loose, 1)) == {(0, 2), (0, 3)}
    assert set(dropped(strict, 1)) == {(0, 2)}


def paragraph(draw: random.Random, words: int = 30) -> str:
    """Return a paragraph of random words, far over the least length of the tests."""
    return " ".join(draw.choice(("casa", "rio", "ponte", "não", "água", "céu")) + str(draw.randrange(10**6))
                    for _ in range(words))


def test_repeated_paragraphs_stay_once(tmp_path):
    draw = random.Random(1)
    own = [paragraph(draw) for _ in range(4)]
    rights, twice, short = paragraph(draw), paragraph(draw), "Todos os direitos reservados."
    texts = [f"{own[0]}\n\n{rights}\n \n{short}",
             f"{rights.upper()}\n\n\n{own[1]}\n\n{short}\n\n{twice}",
             f"{own[2]}\n\n{short}\n\n{twice}\n\n{rights}\n\n{rights}",
             f"{rights}\n\n{rights}", f"{rights}\n\n{rights}"]
    shards = write_shards(tmp_path / "in", [texts[:1], texts[1:]])
    result = find_duplicates(shards, DedupSettings(near=False), tmp_path / "work", 1)
    # The last document is a copy of the one before: it is no place where the paragraph stands.
    assert dropped(result, 2) == {(1, 3): ("dedup.paragraphs", 2), (1, 4): ("dedup.exact", "a/1:3")}
    assert not result.of_shard(0)
    shortened = [result.of_shard(1)[line].apply(Document(texts[line], "a", "CC0", "1", line)) for line in (1, 2)]
    rest = f"{short}\n\n{twice}"
    assert [document.text for document in shortened] == [f"{own[1]}\n\n{rest}", f"{own[2]}\n\n{rest}"]
    assert shortened[1].notes == {"paragraphs": {"removed": 2, "characters": 2 * len(rights)}}
    report = result.report
    assert (report["edited"], report["removed_paragraphs"], report["removed_characters"]) == (2, 5, 5 * len(rights))
    assert result.of_shard(1)[4].apply(Document("", "a", "CC0", "1", 4)) == Dropped(
        "dedup.exact", "a/1:3", "one document per text")
    twice_is_enough = DedupSettings(near=False, paragraph_min_documents=2, paragraph_min_characters=len(twice) + 1)
    result = find_duplicates(shards, twice_is_enough, tmp_path / "work", 1)
    assert all(len(decision.paragraphs) <= 2 for decision in result.of_shard(1).values())


def random_corpus(seed: int) -> list[list[tuple[str, str]]]:
    """Return shards whose documents and paragraphs repeat often."""
    draw = random.Random(seed)
    pool = [paragraph(draw, 6) for _ in range(40)]
    texts = ["\n\n".join(draw.choice(pool) for _ in range(draw.randint(1, 3))) for _ in range(300)]
    documents = [(draw.choice("abc"), text) for text in texts]
    return [documents[:10], [], documents[10:200], documents[200:]]


@pytest.mark.parametrize("prefer", [(), ("c", "b")], ids=["by input", "by source"])
def test_all_is_as_a_plain_loop_finds_it(tmp_path, monkeypatch, prefer):
    corpus = random_corpus(3)
    order = {name: place for place, name in enumerate(prefer)}
    documents = sorted(((order.get(source, len(prefer)), shard, line, text) for shard, texts in enumerate(corpus)
                        for line, (source, text) in enumerate(texts, 1)))
    seen: dict[str, tuple[int, int]] = {}
    copies = set()
    stands = defaultdict(list)
    for _, shard, line, text in documents:
        if text in seen:
            copies.add((shard, line))
        else:
            seen[text] = (shard, line)
            for number, piece in enumerate(text.split("\n\n")):
                stands[piece].append((shard, line, number))
    goes = defaultdict(set)
    for places in stands.values():
        if len({place[:2] for place in places}) >= 4:
            for shard, line, number in places[1:]:
                goes[shard, line].add(number)
    settings = DedupSettings(near=False, paragraph_min_characters=20, paragraph_min_documents=4, prefer=prefer)
    shards = write_shards(tmp_path / "in", corpus)
    written = []
    for entries_at_once in (1 << 20, 37):
        monkeypatch.setattr(sorted_keys, "ENTRIES_AT_ONCE", entries_at_once)
        result = find_duplicates(shards, settings, tmp_path / f"work-{entries_at_once}", 1)
        written.append(folder_bytes(result.folder))
    assert written[0] == written[1], "the memory that is used changes nothing"
    found = dropped(result, 4)
    assert {place for place, (rule, _) in found.items() if rule == "dedup.exact"} == copies and len(copies) > 30
    assert {(shard, line): set(decision.paragraphs) for shard in range(4)
            for line, decision in result.of_shard(shard).items() if decision.paragraphs} == {
        place: numbers for place, numbers in goes.items() if place not in found}
    for (shard, line), numbers in goes.items():
        empties = len(numbers) == len(corpus[shard][line - 1][1].split("\n\n"))
        assert (found.get((shard, line), ("",))[0] == "dedup.paragraphs") == empties


def test_the_report_tells_sizes_sources_and_the_largest(tmp_path):
    draw = random.Random(2)
    texts = [paragraph(draw, 40) for _ in range(3)]
    shards = write_shards(tmp_path / "in", [
        [("web", texts[0])] * 5, [("wiki", texts[0]), ("wiki", texts[1]), ("web", texts[1] + " fim"), ("web", texts[2])]])
    report = find_duplicates(shards, DedupSettings(), tmp_path / "work", 1).report
    assert (report["documents"], report["kept"], report["clusters"]) == (9, 3, 2)
    assert report["clusters_by_size"] == {"2": 1, "3-4": 0, "5-8": 1}
    assert report["largest_clusters"][0] == {
        "documents": 6, "kept": "web/0:1", "others": ["web/0:2", "web/0:3", "web/0:4", "web/0:5", "wiki/1:1"], "exact": 5}
    assert report["source_pairs"] == [
        {"kept": "web", "dropped": "web", "rule": "dedup.exact", "documents": 4},
        {"kept": "web", "dropped": "wiki", "rule": "dedup.exact", "documents": 1},
        {"kept": "wiki", "dropped": "web", "rule": "dedup.near", "documents": 1}]
    assert report["found_with_probability_at_similarity"]["0.8"] == 0.923548
    assert report["settings"]["bands"] == 14


def test_nothing_to_compare_is_no_fault(tmp_path):
    for number, shards in enumerate(([], [[]], [[], ["um texto"]])):
        result = find_duplicates(write_shards(tmp_path / f"in-{number}", shards), DedupSettings(min_similarity=0.5),
                                 tmp_path / f"work-{number}", 1)
        assert (result.report["kept"], result.report["clusters_by_size"]) == (sum(map(len, shards)), {})
        assert all(result.of_shard(shard) == {} for shard in range(len(shards)))


def test_what_cannot_be_used_is_said(tmp_path):
    shards = write_shards(tmp_path / "in", [["um texto"], []])
    with pytest.raises(DataError, match="(?s)none.zst: is no file.*00000.jsonl.zst: is given twice.*workers: is 0"):
        find_duplicates([*shards, shards[0], Path("none.zst")], DedupSettings(), tmp_path / "work", 0)
    packed = shards[0].read_bytes()
    shards[0].write_bytes(packed[:-20] + b"x" * 20)
    with pytest.raises(DataError, match="clean-00000.jsonl.zst: is damaged .*; it must be whole"):
        find_duplicates(shards, DedupSettings(), tmp_path / "work", 1)
    for bad, words in (({"min_words": 3}, "must be at least shingle_words"),
                       ({"prefer": ("a", "a")}, "names a source twice"),
                       ({"band": 3}, "Extra inputs are not permitted"), ({"rows": 0}, "greater than or equal to 1")):
        with pytest.raises(ValidationError, match=words):
            DedupSettings(**bad)

"""Every kind of line and file: what is a document, what is not and why, and where a damaged file breaks."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import struct

import pytest
import zstandard

from megatron_ttl.data import documents
from megatron_ttl.data.documents import LONGEST_LINE, BadLine, DocumentReader, input_faults, parse_line, read_chunks
from megatron_ttl.errors import DataError

GOOD = {
    "plain": (b'{"text": "um"}', "um"),
    "crlf": (b'{"text": "um"}\r\n', "um"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "um"}\n', "um"),
    "spaces around": (b'  {"text": "um"}  \n', "um"),
    "other keys": (b'{"id": 3, "text": "um", "meta": {"text": "dois"}}', "um"),
    "a nested key of the same name first": (b'{"meta": {"text": "dois"}, "text": "um"}', "um"),
    "the key as a value": (b'{"kind": "text", "text": "um"}', "um"),
    "escapes": (b'{"text": "\\u00e1\\n\\t\\"\\\\"}', 'á\n\t"\\'),
    "utf-8": ('{"text": "ação 👍"}'.encode(), "ação 👍"),
    "surrogate pair": (b'{"text": "\\ud83d\\udc4d"}', "👍"),
    "nul": (b'{"text": "a\\u0000b"}', "a\0b"),
    "spaces inside": (b'{"text": "  um  "}', "  um  "),
    "nan beside": (b'{"score": NaN, "text": "um"}', "um"),
    "infinity beside": (b'{"score": -Infinity, "text": "um"}', "um"),
    "space sign": ('{"text": "\u2581"}'.encode(), "\u2581"),
    "eight megabytes": (b'{"text": "' + b"x" * (8 << 20) + b'"}', "x" * (8 << 20)),
}

BAD = {
    "half": (b'{"text": "um', "broken JSON"),
    "two objects": (b'{"text": "um"} {"text": "dois"}', "broken JSON"),
    "no JSON": (b"um texto", "broken JSON"),
    "single quotes": (b"{'text': 'um'}", "broken JSON"),
    "trailing comma": (b'{"text": "um",}', "broken JSON"),
    "raw newline sign": (b'{"text": "a\x0bb"}', "broken JSON"),
    "raw nul": (b'{"text": "a\x00b"}', "broken JSON"),
    "raw nul line": (b"\x00\x00\x00", "broken JSON"),
    "bad escape": (b'{"text": "\\x41"}', "broken JSON"),
    "huge number": (b'{"n": ' + b"9" * 5000 + b', "text": "um"}', "broken JSON"),
    "deep lists": (b"[" * 100_000, "broken JSON"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "broken JSON"),
    "mark inside": (b'\xef\xbb\xbf\xef\xbb\xbf{"text": "um"}', "broken JSON"),
    "string": (b'"um"', "a string instead of an object"),
    "number": (b"3", "a number instead of an object"),
    "null": (b"null", "null instead of an object"),
    "true": (b"true", "a boolean instead of an object"),
    "nan": (b"NaN", "a number instead of an object"),
    "list": (b'[{"text": "um"}]', "a list instead of an object"),
    "no key": (b'{"texto": "um"}', "no key 'text'"),
    "empty object": (b"{}", "no key 'text'"),
    "other case": (b'{"Text": "um"}', "no key 'text'"),
    "text null": (b'{"text": null}', "the text is null"),
    "text number": (b'{"text": 3}', "the text is a number"),
    "text fraction": (b'{"text": 3.5}', "the text is a number"),
    "text boolean": (b'{"text": false}', "the text is a boolean"),
    "text list": (b'{"text": ["um"]}', "the text is a list"),
    "text object": (b'{"text": {"text": "um"}}', "the text is an object"),
    "empty text": (b'{"text": ""}', "the text is empty"),
    "blank text": (b'{"text": " \\n\\t\\u00a0"}', "the text is empty"),
    "invalid utf-8": (b'{"text": "a\xffb"}', "invalid UTF-8"),
    "latin-1": ('{"text": "ação"}'.encode("latin-1"), "invalid UTF-8"),
    "cut utf-8": (b'{"text": "\xc3', "invalid UTF-8"),
    "utf-8 surrogate": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    "overlong utf-8": (b'{"text": "\xc0\xaf"}', "invalid UTF-8"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate"),
    "low surrogate": (b'{"text": "\\udc00"}', "lone surrogate"),
    "reversed pair": (b'{"text": "\\udc4d\\ud83d"}', "lone surrogate"),
    "key twice": (b'{"text": "um", "text": "dois"}', "the key 'text' is given twice"),
    "two objects, old line end": (b'{"text": "um"}\r{"text": "dois"}', "broken JSON"),
    "comment": (b'// {"text": "um"}', "broken JSON"),
    "key without quotes": (b'{text: "um"}', "broken JSON"),
    "a Python literal": (b'{"text": "um", "ok": True}', "broken JSON"),
    "raw tab": (b'{"text": "a\tb"}', "broken JSON"),
    "utf-16 without a mark": ('{"text": "um"}'.encode("utf-16-le"), "broken JSON"),
    "utf-16 with a mark": ('{"text": "um"}'.encode("utf-16"), "invalid UTF-8"),
    "packed": (gzip.compress(b'{"text": "um"}', mtime=0).replace(b"\n", b""), "invalid UTF-8"),
}


@pytest.mark.parametrize("name", GOOD)
def test_documents(name):
    line, text = GOOD[name]
    assert parse_line(line, "text") == text


@pytest.mark.parametrize("name", BAD)
def test_bad_lines(name):
    line, reason = BAD[name]
    assert parse_line(line, "text") == BadLine(reason)


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_reported_with_file_line_and_byte(tmp_path, name):
    line, reason = BAD[name]
    before = [b'{"text": "p\xc3\xa3o"}\r\n', b"\n", b'{"text": "um"}\n']
    for path, pack in ((tmp_path / "a.jsonl", bytes), (tmp_path / "b.jsonl.gz", gzip.compress)):
        path.write_bytes(pack(b"".join([*before, line, b"\n", before[0]])))
        reader = DocumentReader([path], max_bad_fraction=1)
        assert list(reader) == ["pão", "um", "pão"]
        assert reader.bad_lines == [f"{path}:4:{sum(map(len, before))}: {reason}; every line must be an object with a text "
                                    "under 'text'; repair or remove it"]


@pytest.mark.parametrize("line", [b"", b"\n", b"\r\n", b"  \t \r\n", b"\xef\xbb\xbf\n"])
def test_blank_lines(line):
    assert parse_line(line, "text") is None


def test_the_key_is_a_choice():
    assert parse_line('{"text": 3, "conteúdo": "um"}'.encode(), "conteúdo") == "um"
    assert parse_line('{"conteúdo": "um", "conteúdo": "um"}'.encode(), "conteúdo") == BadLine(
        "the key 'conteúdo' is given twice")


PACKERS = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
LINES = [json.dumps({"text": f"documento {number} " * (number % 9)}).encode() + b"\n" for number in range(1000)]


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_chunks_hold_every_line_and_know_their_place(tmp_path, name, chunk_bytes):
    payload = b"".join(LINES) + b'{"text": "sem fim de linha"}'
    path = tmp_path / name
    path.write_bytes(PACKERS[path.suffix](payload))
    chunks = list(read_chunks(path, chunk_bytes, file=3))
    assert b"".join(line for chunk in chunks for line in chunk.lines) == payload
    assert sum(len(chunk.lines) for chunk in chunks) == 1001
    number = 1
    for chunk in chunks:
        joined = b"".join(chunk.lines)
        assert payload[chunk.first_byte : chunk.first_byte + len(joined)] == joined
        assert (chunk.first_line, chunk.file) == (number, 3)
        assert len(joined) < chunk_bytes + max(map(len, LINES))
        number += len(chunk.lines)
    done = [chunk.input_bytes for chunk in chunks]
    assert done == sorted(done) and done[-1] <= path.stat().st_size


def test_a_packed_file_may_have_several_members_and_any_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(LINES[1]) + gzip.compress(LINES[2]))
    assert [chunk.lines for chunk in read_chunks(path)] == [LINES[1:3]]
    to_skip = struct.pack("<II", 0x184D2A53, 3) + b"abc"
    path.write_bytes(to_skip + PACKERS[".zst"](LINES[1]) + PACKERS[".zst"](b"") + PACKERS[".zst"](LINES[2]) + to_skip)
    assert [chunk.lines for chunk in read_chunks(path)] == [LINES[1:3]]


def test_an_empty_file_has_no_lines(tmp_path):
    for name, payload in (("a.jsonl", b""), ("b.jsonl.gz", gzip.compress(b"")), ("c.jsonl.gz", b"")):
        (tmp_path / name).write_bytes(payload)
        assert list(read_chunks(tmp_path / name)) == []


def noise_lines(count: int) -> list[bytes]:
    draw = random.Random(0)
    return [json.dumps({"text": draw.randbytes(40).hex()}).encode() + b"\n" for _ in range(count)]


@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 20])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_cut_short_is_an_error_with_its_line(tmp_path, share, chunk_bytes, suffix):
    lines = noise_lines(20_000)
    packed = PACKERS[suffix](b"".join(lines))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: int(share * len(packed))])
    with pytest.raises(DataError, match=r":\d+:\d+: the packed file ends in the middle; it must be whole") as caught:
        list(read_chunks(path, chunk_bytes))
    line, byte = map(int, str(caught.value).split(f"{suffix}:")[1].split(":")[:2])
    assert byte == len(b"".join(lines[: line - 1]))
    assert abs(line - share * 20_000) < 0.05 * 20_000, "the line is where the bytes end"


def test_a_damaged_packed_file_is_an_error_with_its_line(tmp_path):
    packed = bytearray(gzip.compress(b"".join(noise_lines(20_000))))
    middle = len(packed) // 2
    packed[middle : middle + 50] = b"\xff" * 50
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"a.jsonl.gz:\d+:\d+: the packed file is damaged \("):
        list(read_chunks(path, 1000))
    path.write_bytes(gzip.compress(LINES[1])[:-8] + b"\0" * 8)
    with pytest.raises(DataError, match=rf"a.jsonl.gz:2:{len(LINES[1])}: the packed file is damaged \(CRC check failed"):
        list(read_chunks(path))


def test_a_damaged_zstd_file_is_an_error_with_its_line(tmp_path):
    packed = bytearray(PACKERS[".zst"](b"".join(noise_lines(20_000))))
    packed[len(packed) // 2] ^= 255
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"a.jsonl.zst:\d+:\d+: the packed file is damaged \("):
        list(read_chunks(path, 1000))
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    path.write_bytes(wide.compress(LINES[1]) + wide.flush())
    with pytest.raises(DataError, match=r"a.jsonl.zst:1:0: the packed file is damaged \(Frame requires too much memory"):
        list(read_chunks(path))


def test_a_zstd_file_that_unpacks_to_a_line_without_end_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(b"".join(packer.compress(b"x" * (8 << 20)) for _ in range(20)) + packer.flush())
    assert path.stat().st_size < 64 << 10
    with pytest.raises(DataError, match=r"a.jsonl.zst:1:0: is longer than 64 MiB"):
        list(read_chunks(path))


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(LINES[1])
    with pytest.raises(DataError, match="a.jsonl.zst:1:0: is named .zst and is not packed with zstd"):
        list(read_chunks(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.jsonl.gz").write_bytes(LINES[1])
    with pytest.raises(DataError, match="a.jsonl.gz:1:0: is named .gz and is not packed with gzip"):
        list(read_chunks(tmp_path / "a.jsonl.gz"))
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "b.jsonl").write_bytes("\ufeff{}".encode(encoding))
        with pytest.raises(DataError, match="b.jsonl:1:0: is UTF-16; it must be UTF-8; convert it"):
            list(read_chunks(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_more_than_64_megabytes_is_an_error(tmp_path, name):
    """A file without line ends, or a packed bomb: it is not read into memory whole."""
    line = b'{"text": "' + b"x" * (LONGEST_LINE - 13) + b'"}\n'
    assert len(line) == LONGEST_LINE
    for more, lines in (b"", 3), (b" ", None):
        payload = LINES[1] + more + line + LINES[2]
        (tmp_path / name).write_bytes(gzip.compress(payload, 1) if name.endswith(".gz") else payload)
        if lines:
            assert sum(len(chunk.lines) for chunk in read_chunks(tmp_path / name)) == lines
        else:
            with pytest.raises(DataError, match=f"{name}:2:{len(LINES[1])}: is longer than 64 MiB; a line is one document"):
                list(read_chunks(tmp_path / name))


def test_a_disk_that_fails_is_an_error_with_its_place(tmp_path, monkeypatch):
    """The chunk in which it failed: from there on nothing is known."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))

    class Failing:
        def __init__(self, handle):
            self.handle = handle

        def readline(self, size):
            if self.handle.tell() > 20_000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self.handle.readline(size)

    monkeypatch.setattr(documents, "_unpacked", lambda packed, head: Failing(packed))
    with pytest.raises(DataError, match=r"a.jsonl:\d+:\d+: cannot be read .Input/output error.; it must be") as caught:
        list(read_chunks(tmp_path / "a.jsonl", chunk_bytes=1000))
    line, byte = map(int, str(caught.value).split(".jsonl:")[1].split(":")[:2])
    assert byte == len(b"".join(LINES[: line - 1])) and 19_000 < byte <= 20_100


def test_all_faults_of_the_inputs_are_named_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES[1])
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "a.jsonl.bz2").write_bytes(b"x")
    paths = [tmp_path / name for name in ("a.jsonl", "none.jsonl", "nor.jsonl.gz", "folder.jsonl", "a.parquet",
                                          "a.jsonl.bz2", "../" + tmp_path.name + "/a.jsonl")]
    said = "\n".join(input_faults(paths))
    for fault in ("none.jsonl: does not exist; it must be a file of documents", "nor.jsonl.gz: does not exist",
                  "folder.jsonl: is not a file", "a.parquet: has an unknown suffix; it must end in .jsonl",
                  "a.jsonl.bz2: has an unknown suffix", "a.jsonl: is given twice"):
        assert fault in said
    assert len(input_faults(paths)) == 6
    assert input_faults([tmp_path / "a.jsonl"]) == []
    assert "--input: is empty" in input_faults([])[0]
    with pytest.raises(DataError, match="none.jsonl: does not exist"):
        list(DocumentReader([tmp_path / "none.jsonl"]))


def test_the_reader_gives_texts_and_counts(tmp_path):
    good = [b'{"text": "um"}\n', b"\n", b'{"text": "dois"}\r\n']
    (tmp_path / "a.jsonl").write_bytes(b"".join(good) + b'{"text": 3}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "tr\xc3\xaas"}\n'))
    progress: list[float] = []
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    reader = DocumentReader(paths, max_bad_fraction=0.2, on_progress=progress.append)
    assert list(reader) == ["um", "dois", "três"]
    assert [(s["file"], s["documents"], s["rejected"]) for s in reader.sources] == [("a.jsonl", 2, 1), ("b.jsonl.gz", 1, 0)]
    assert reader.rejected == {"the text is a number": 1}
    assert progress[-1] == reader.size_bytes == sum(path.stat().st_size for path in paths)


def test_the_reader_refuses_a_corpus_with_too_many_bad_lines_at_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "um"}\n{"text": 3}\n' + b"x\n" * 8)
    reader = DocumentReader([tmp_path / "a.jsonl"], max_bad_fraction=0.5)
    texts = []
    with pytest.raises(DataError, match=r"9 of 10 lines are no documents \(8 x broken JSON, 1 x the text is a number\); at "
                                        "most 50 % may be; .*--max-bad-fraction") as caught:
        texts.extend(reader)
    assert caught.value.faults[0].endswith("repair or remove it")
    assert "a.jsonl:2:15: the text is a number" in str(caught.value)
    assert len(caught.value.faults) == 6, "the first five bad lines and the sum"
    assert list(DocumentReader([tmp_path / "a.jsonl"], max_bad_fraction=0.9)) == ["um"], "at the threshold is allowed"

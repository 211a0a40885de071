"""Any bytes in any file that is read give a value or a fault in our own words: no crash, no hang, no flood of memory.

Short: hypothesis, some hundred changed files per reader. Long: a million inputs that coverage guides, by atheris
(`pip install -e '.[fuzz]'`); where there is no wheel of it for this Python, hypothesis with more examples, and it says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from fuzz_mutations import KINDS, Change, apply
from fuzz_targets import PROFILE, RUN, TARGETS, Target, check
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_ttl.errors import DataError

EXAMPLES, EXAMPLES_LONG = 200, 20_000
INPUTS = {"tensors": 40_000, "run file": 20_000, "profile": 20_000, "overrides": 20_000, "run settings": 40_000,
          "tokenizer": 40_000}
"""Of the slow readers; the others get `INPUTS_EACH`. Together more than a million."""
INPUTS_EACH = 90_000

_NUMBER = st.integers(0, 2**16 - 1)
CHANGES = st.lists(st.builds(Change, st.integers(0, KINDS - 1), _NUMBER, _NUMBER, _NUMBER), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return folder and valid payloads of a target, made once."""
    made = {}

    def prepare(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("fuzz")
            made[name] = folder, TARGETS[name].prepare(folder)
        return made[name]

    return prepare


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_accepted(prepared, name):
    """Otherwise all that follows would only look at the first check of a reader."""
    folder, seeds = prepared(name)
    assert seeds and all(check(TARGETS[name], seed, folder) for seed in seeds)


def feed_changed(name, folder, seeds, examples):
    """Let hypothesis change the valid files of a target."""
    target = TARGETS[name]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), CHANGES)
    @example(b"", []).via("nothing at all")
    def feed(seed, changes):
        check(target, apply(seed, changes, seeds), folder)

    feed()


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(prepared, name):
    """The short form."""
    feed_changed(name, *prepared(name), EXAMPLES)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TARGETS)
def test_a_million_inputs(prepared, repository, tmp_path, capsys, name):
    """The long form: this target's share of them."""
    if importlib.util.find_spec("atheris") is None:
        feed_changed(name, *prepared(name), EXAMPLES_LONG)
        with capsys.disabled():
            print(f"\n{name}: {EXAMPLES_LONG:,} inputs by hypothesis, for atheris is not installed", file=sys.stderr)
        return
    wanted = INPUTS.get(name, INPUTS_EACH)
    tests = repository / "tests"
    path = os.pathsep.join(map(str, (repository, tests, tests / "checkpoint", *sys.path)))
    command = [sys.executable, str(tests / "reliability/fuzz_atheris.py"), name, str(wanted), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1100,
                          env={**os.environ, "PYTHONPATH": path})
    left = [*tmp_path.glob("crash-*"), *tmp_path.glob("timeout-*"), *tmp_path.glob("oom-*"), *tmp_path.glob("wrong-*")]
    found = {file.name: file.read_bytes()[:3000] for file in left}
    result = json.loads((tmp_path / "result.json").read_text()) if (tmp_path / "result.json").exists() else {}
    assert done.returncode == 0 and not found, (found, result, done.stderr[-3000:])
    assert result["inputs"] >= wanted and result["accepted"] > 0, result
    with capsys.disabled():
        print(f"\n{name}: {result['inputs']:,} inputs by atheris in {result['seconds']:.0f} s, "
              f"{result['accepted']:,} accepted", file=sys.stderr)


def test_the_long_form_is_a_million():
    """Every reader in the table counts."""
    assert INPUTS.keys() <= TARGETS.keys()
    assert sum(INPUTS.get(name, INPUTS_EACH) for name in TARGETS) >= 1_000_000


# --- what was found, most of it here: each once raised something else, or took gigabytes or minutes ---

DEEP = b"a." * 2000 + b"a = 1"
MANIFEST = b'{"format":"megatron_ttl checkpoint","version":1,"step":3,"files":%s,"groups":{"g":{"t":{"dtype":"F32","shape":%s}}}}'
DATASET = b'{"format": "megatron_ttl dataset", "version": 1, "sources": %s}'
FOUND = {
    "half a character": ("manifest", MANIFEST.replace(b'"t"', b'"\\ud800"') % (b"{}", b"[]")),
    "line break in a key": ("manifest", MANIFEST.replace(b'"step"', b'"\\n":0,"step"') % (b"{}", b"[]")),
    "line break in a dataset's key": ("dataset manifest", DATASET.replace(b'"sources"', b'"\\n"') % b"[]"),
    "line separator in a tensor's dtype": ("tensors", b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"\xe2\x80\xa8","shape":[2],'
                                           b'"data_offsets":[0,8]}}'.ljust(80)),
    "an index without boundaries": ("index", b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\4" + bytes(16)),
    "no weights": ("model weights", b""),
    "settings without run": ("run settings", b"{}"), "settings null": ("run settings", b"null"),
    "settings of lists": ("run settings", b'{"run": [1]}'), "settings deep": ("run settings", b"[" * 5000),
    "run file deep by dots": ("run file", DEEP), "run file deep by lists": ("run file", b"a=" + b"[" * 300 + b"]" * 300),
    "run file deep by a table": ("run file", b"[" + b"a." * 2000 + b"a]"),
    "override deep": ("overrides", b"data.sources=[{" + DEEP + b"}]"),
    "override of bytes": ("overrides", b'data.sources=[{prefix="\xa6"}]'), "override no UTF-8": ("overrides", b"\xff"),
    "profile deep": ("profile", b'{"bf16":' * 300 + b"1" + b"}" * 300),
    "tokens of 400 digits": ("overrides", b"train.steps=none\ntrain.tokens=" + b"9" * 400),
    "seed of 5,000 bits": ("run file", RUN.replace("[model]", "seed = 0x" + "f" * 4500 + "\n[model]").encode()),
    "row with a step of text": ("metrics", b'{"step": "4"}\n'), "row deep": ("metrics", b"[" * 5000 + b"\n"),
    "row with a total of text": ("metrics", b'{"energy_kwh": "x"}\n'),
    "row with a total of 400 digits": ("metrics", b'{"energy_kwh": ' + b"9" * 400 + b"}\n"),
    "a long key": ("run file", b"a" * 50_000 + b" = 1"),
    # bombs: small to send, large to read
    "300,000 files": ("manifest", MANIFEST % (b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}", b"[]")),
    "a million wrong sizes": ("manifest", MANIFEST % (b"{}", b"[" + b'"",' * 1_000_000 + b'""]')),
    "a million sources": ("dataset manifest", DATASET % (b"[" + b"0," * 1_000_000 + b"0]")),
    "half a million empty sources": ("dataset manifest", DATASET % (b"[" + b"[]," * 500_000 + b"[]]")),
    "600,000 unknown keys of a dataset": ("dataset manifest", DATASET.replace(
        b'"sources"', b",".join(b'"%d":0' % i for i in range(600_000)) + b',"sources"') % b"[]"),
    "20,000 unknown settings": ("run file", b"".join(b"step%d=1\n" % i for i in range(20_000))),
    "20,000 unknown keys": ("profile", PROFILE[:-1].encode() + b"".join(b',"k%d":0' % i for i in range(20_000)) + b"}"),
    "a list of 50,000": ("run file", RUN.encode() + b"[evaluation]\nprefixes=[" + b"0," * 50_000 + b"]"),
    "300 KiB of settings": ("run file", b"#" * (300 << 10)),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(prepared, what):
    """Every one is refused, but rows of metrics: those that are none are cut or passed over."""
    name, payload = FOUND[what]
    accepted = check(TARGETS[name], payload, prepared(name)[0], most_seconds=10)
    assert accepted == (name == "metrics")


@pytest.mark.parametrize("pieces", [1, 2], ids=["read", "said by the library"])
def test_pieces_that_are_no_text(prepared, pieces):
    """Bytes that are no UTF-8, in a piece; and twice the same, which the library says with these bytes."""
    folder, seeds = prepared("tokenizer")
    broken, count = re.subn(rb"(?<=\n\x04)[a-z]{4}(?=\x15)", b"\xbc\xbc\xbc\xbc", seeds[0], count=pieces)
    assert count == pieces and not check(TARGETS["tokenizer"], broken, folder)


def complain(payload, folder):
    raise DataError("the file is wrong")


def fail(payload, folder):
    raise ValueError("broken")


def be_slow(payload, folder):
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(("feed", "error", "message"), [
    (fail, ValueError, "broken"), (complain, AssertionError, "not the form of a fault"), (be_slow, AssertionError, "0.1 s"),
    (lambda payload, folder: bytearray(b"x") * (300 << 20), AssertionError, "bytes"),
], ids=["exception", "form", "time", "memory"])
def test_the_check_sees_what_it_must(tmp_path, feed, error, message):
    """All that the other tests rely on."""
    with pytest.raises(error, match=message):
        check(Target("any", lambda folder: (), feed), b"", tmp_path, most_seconds=0.05 if feed is be_slow else 2)

"""What the training of a tokenizer says that it needs is what it takes; drawing a sample takes no more than the sample."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

# The peak is read where the kernel begins anew with the program; `ru_maxrss` would count the parent's.
TRAIN = """
import random, re, sys
from megatron_ttl.tokenizer.train import draw_sample, memory_estimate, train_tokenizer
folder, count, words, kept = sys.argv[1], *map(int, sys.argv[2:])
draw = random.Random(0)
syllables = "ca sa me ni no pa to ra ção lha do da de ri vé pé mar sol".split()
vocabulary = ["".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(200_000)]
texts = (" ".join(draw.choices(vocabulary, k=words)) for _ in range(count))
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = peak()
if kept:
    draw_sample(texts, None, kept, 0)
    print(peak() - before)
else:
    result = train_tokenizer(texts, folder, 8000)
    print(peak() - before, result["memory_estimate_bytes"])
"""


def measured(tmp_path, *arguments: int) -> list[int]:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / "t"), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, check=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "words"), [(1_000, 400), (3_000, 400), (150_000, 5)], ids=["small", "larger", "short"])
def test_the_estimate_is_an_upper_bound_and_no_exaggeration(tmp_path, count, words):
    peak, estimate = measured(tmp_path, count, words, 0)
    assert 0.25 * estimate < peak < estimate


@pytest.mark.slow
def test_drawing_a_sample_takes_no_more_the_more_there_is_to_draw_from(tmp_path):
    (few,), (many,) = measured(tmp_path, 5_000, 100, 1_000_000), measured(tmp_path, 50_000, 100, 1_000_000)
    assert many < few + (2 << 20) and many < 8 << 20


def test_the_tool_says_before_it_trains_what_that_takes(repository, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"palavra {n} " * 9}) + "\n" for n in range(300)))
    command = [sys.executable, str(repository / "tools" / "train_tokenizer.py"), "--input", str(tmp_path / "a.jsonl"),
               "--output", str(tmp_path / "t"), "--samples", "200", "--vocab-size", "280"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = re.fullmatch(r"sample: 200 of 300 documents, 2\d\.\d KiB; training on it takes up to about 80\.\d MiB of "
                        r"memory\n", done.stderr)
    assert done.returncode == 0 and said, done.stderr

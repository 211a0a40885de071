"""The speed report: it measures the same text three ways, and refuses an encoder whose ids are not SentencePiece's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import documents, write_tokenizer

from megatron_ttl.data.bench_preprocess import bench_preprocess
from megatron_ttl.errors import ConfigError, DataError
from megatron_ttl.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tokenizer and a file of documents; one holds the sign that SentencePiece alone would lose."""
    folder = tmp_path_factory.mktemp("bench")
    texts = [*documents(300), "casa\u2581casa"]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return folder / "a.jsonl", str(write_tokenizer(folder / "tokenizer")), texts


def test_the_report_has_rates_and_ratios(source, repository: Path):
    """Every rate is there, and the ratios are those of the rates; the folder of the measurement is gone."""
    file, tokenizer, texts = source
    tool = subprocess.run([sys.executable, repository / "tools" / "bench.py", "preprocess", "--input", file, "--tokenizer",
                           tokenizer, "--workers", "1", "2", "--json"], capture_output=True, text=True, timeout=60)
    assert (tool.returncode, tool.stderr) == (0, "")
    report = json.loads(tool.stdout)
    assert report["texts"] == len(texts) and report["text_mb"] == pytest.approx(sum(len(t.encode()) for t in texts) / 1e6)
    assert report["ids"] == sum(map(len, Tokenizer.load(tokenizer).encode_whole(texts)))
    assert report["preprocess_over_encoder"] == pytest.approx(
        report["preprocess_mb_per_cpu_s"] / report["encoder_mb_per_cpu_s"])
    assert report["workers_1_mb_per_s"] > 0 and 0 < report["workers_2_parent_cpu_share"] < 1
    part = bench_preprocess([file], tokenizer, workers=[], max_mb=0.01, repeats=1)
    assert 0.01 <= part["text_mb"] < 0.02 and not [name for name in part if name.startswith("workers")]


def test_other_ids_than_sentencepieces_are_refused(source, monkeypatch):
    """A wrong encoder is no fast encoder."""
    file, tokenizer, _ = source
    encode = Tokenizer.encode_packed
    monkeypatch.setattr(Tokenizer, "encode_packed", lambda self, texts: [ids[4:] for ids in encode(self, texts)])
    with pytest.raises(DataError, match="text 0: its ids are not SentencePiece's"):
        bench_preprocess([file], tokenizer, workers=[])
    with pytest.raises(ConfigError, match=r"--workers: is 0(.|\n)*--repeats: is 0"):
        bench_preprocess([file], tokenizer, workers=[0], repeats=0)

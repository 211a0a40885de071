#!/usr/bin/env bash
# A corpus: one JSON object a line, {"text": "..."}. This one is the project's own, written by hand and composed.
set -euo pipefail
cd "$(dirname "$0")/.."
python examples/sample_corpus/compose.py --documents 3000 --seed 1 --output data/sample.jsonl

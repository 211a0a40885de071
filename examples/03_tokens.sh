#!/usr/bin/env bash
# Text to tokens, 5 % of the documents held out; then look at what came out, and check every document of it.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/preprocess_data.py --input data/sample.jsonl --tokenizer tokenizers/sample \
    --output-prefix data/sample --held-out-fraction 0.05 --workers 2
python tools/inspect_data.py --prefix data/sample --verify --show 2

#!/usr/bin/env bash
# A tokenizer for exactly this text. Real runs take 32,000 pieces; 2,048 are right for a megabyte.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/train_tokenizer.py --input data/sample.jsonl --vocab-size 2048 --output tokenizers/sample

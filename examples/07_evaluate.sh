#!/usr/bin/env bash
# Nats per token, perplexity and bits per byte on the documents that training never saw.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/evaluate.py --model models/day --perplexity data/sample_heldout

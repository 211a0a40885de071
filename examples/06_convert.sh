#!/usr/bin/env bash
# A checkpoint becomes a Hugging Face model folder; transformers must compute the same logits or none is written.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/convert_to_hf.py --run runs/day --output models/day --overwrite

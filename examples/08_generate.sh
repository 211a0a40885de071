#!/usr/bin/env bash
# Text. The same seed gives the same text; --greedy takes the likeliest piece each time.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/generate.py --model models/day --prompt "Era uma vez" --max-new-tokens 64 --temperature 0.8 --seed 1
python tools/generate.py --model models/day --prompt "A receita" --max-new-tokens 32 --greedy

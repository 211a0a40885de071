#!/usr/bin/env bash
# Before anything runs: every fault at once, and what the run will take. Then the settings, and where each came from.
set -euo pipefail
cd "$(dirname "$0")/.."
python pretrain_ttl.py --deepspeed_config configs/cpu.json --config configs/debug.toml --dry-run
python tools/show_config.py --deepspeed_config configs/cpu.json --config configs/debug.toml optimizer.lr=4e-3

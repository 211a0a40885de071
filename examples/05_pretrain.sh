#!/usr/bin/env bash
# Train, be interrupted, go on: the first command is stopped after fifteen seconds as Ctrl-C would, the second resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
run=(python pretrain_ttl.py --deepspeed_config configs/cpu.json --config configs/debug.toml run.dir=runs/day)
code=0
timeout --signal=INT 15 "${run[@]}" || code=$?
echo "left with $code: 85 and 124 mean stopped with a checkpoint, 0 that it was already done"
"${run[@]}"

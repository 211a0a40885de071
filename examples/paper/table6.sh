#!/usr/bin/env bash
# TeenyTinyLlama, Table 6: tokens, perplexity, kWh and kg CO2e at every evaluation of a run, and what the second half bought.
#   RUN="runs/ttl_460m" bash examples/paper/table6.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
if have_runs; then
    attempt python tools/report.py "${runs[@]}"
fi
finish ttl_table6

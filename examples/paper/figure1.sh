#!/usr/bin/env bash
# TeenyTinyLlama, Figure 1: training loss and perplexity, over tokens and not over steps; loss against scaling laws.
#   RUN="runs/ttl_160m runs/ttl_460m" bash examples/paper/figure1.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
if have_runs; then
    attempt python tools/report.py "${runs[@]}" --output "$OUT/figure1" \
        --constants ttl-paper hoffmann-text hoffmann-tex besiroglu
fi
finish ttl_figure1b

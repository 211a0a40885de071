#!/usr/bin/env bash
# TeenyTinyLlama, Figure 2: accuracy on ARC at every checkpoint, with bars of one standard error.
#   RUN="runs/ttl_460m" TASKS=arc_pt_ttl DATA=tasks bash examples/paper/figure2.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
scored=()
if have_runs && have_data tools/evaluate.py; then
    for run in "${runs[@]}"; do
        attempt python tools/evaluate.py --run "$run" --every-checkpoint --tasks "${TASKS:-arc_pt_ttl}" --data "$DATA" \
            ${limit[@]+"${limit[@]}"}
        if [ -e "$run/scores.jsonl" ]; then scored+=("$run"); fi
    done
    if [ ${#scored[@]} -gt 0 ]; then attempt python tools/report.py "${scored[@]}" --output "$OUT/figure2"; fi
fi
finish ttl_figure2

#!/usr/bin/env bash
# TeenyTinyLlama, Table 5: classification after fine-tuning. The paper chose the best epoch on the test set; here a part of
# the training rows chooses it, and the test set is opened once. Encoders (BERTimbau) are model folders too.
#   MODEL="models/a bertimbau-base" TASKS="hatebr assin2" SEEDS=3 bash examples/paper/table5.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
read -r -a tasks <<< "${TASKS:-imdb faquad_nli hatebr assin2 agnews}"
outputs=()
if have_models && have_data tools/finetune.py; then
    for task in "${tasks[@]}"; do
        for model in "${models[@]}"; do
            output="$OUT/table5/$task/$(basename "$model")"
            attempt python tools/finetune.py --task "$task" --model "$model" --data "$DATA" \
                --seeds "${SEEDS:-3}" --output "$output"
            if [ -e "$output/result.json" ]; then outputs+=("$output"); fi
        done
    done
    if [ ${#outputs[@]} -gt 0 ]; then attempt python tools/finetune.py --table "${outputs[@]}"; fi
fi
finish ttl_table5

#!/usr/bin/env bash
# TeenyTinyLlama, Table 4: ARC, HellaSwag, MMLU and TruthfulQA in Portuguese, asked as that paper asked them.
#   MODEL="models/a models/b" DATA=tasks bash examples/paper/table4.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
if have_models && have_data tools/evaluate.py; then
    score_table arc_pt_ttl hellaswag_pt_ttl mmlu_pt_ttl truthfulqa_pt_mc2_ttl
fi
finish ttl_table4

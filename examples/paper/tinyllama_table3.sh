#!/usr/bin/env bash
# TinyLlama, Table 3: the four tasks of InstructEval. HumanEval runs what the model wrote, in a jail.
#   MODEL="models/a" DATA=tasks bash examples/paper/tinyllama_table3.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
if have_models && have_data tools/evaluate.py; then
    score_table mmlu_instructeval bbh_instructeval humaneval_instructeval drop_instructeval
fi
finish tinyllama_table3

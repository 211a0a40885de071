#!/usr/bin/env bash
# TinyLlama, Table 2: seven tasks of common sense, without demonstrations.
#   MODEL="models/a" DATA=tasks bash examples/paper/tinyllama_table2.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
if have_models && have_data tools/evaluate.py; then
    score_table hellaswag openbookqa winogrande arc_easy arc_challenge boolq piqa
fi
finish tinyllama_table2

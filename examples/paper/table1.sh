#!/usr/bin/env bash
# TeenyTinyLlama, Table 1: how many tokens a text of 7,400 words takes. The paper's text was not published: give your own.
#   TOKENIZERS="tokenizers/ttl BERTimbau=vocab.txt" TEXT="a.txt b.jsonl.gz" bash examples/paper/table1.sh
set -euo pipefail
. "$(dirname "$0")/begin.sh"
[ -n "${TOKENIZERS:-}" ] || TOKENIZERS=$(folders_with tokenizer.model tokenizers demo)
[ -n "${TEXT:-}" ] || TEXT=$(find -L data demo -maxdepth 1 -name '*.jsonl' 2>/dev/null | sort | sed -n 1p || true)
read -r -a tokenizers <<< "${TOKENIZERS//$'\n'/ }" || true
read -r -a texts <<< "$TEXT" || true
if [ ${#tokenizers[@]} = 0 ]; then missing "a tokenizer; tools/train_tokenizer.py makes one, or set TOKENIZERS"
elif needs "${#texts[@]}" "${texts[0]:-}" "a text; set TEXT to .txt or .jsonl files"; then
    attempt python tools/tokenizer_report.py --tokenizers "${tokenizers[@]}" --text "${texts[@]}"
fi
finish ttl_table1

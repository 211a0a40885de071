#!/usr/bin/env bash
# From nothing to a model that writes Portuguese, in minutes on two CPU cores. Called by `make demo`.
#
# Started again, it goes on where it stopped; `rm -r demo` begins anew.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"; }

say "1. a corpus: about 100 hand-written documents, and thousands composed from a grammar"
[ -e demo/sample.jsonl ] || python examples/sample_corpus/compose.py --documents "${DEMO_DOCUMENTS:-14000}" --seed 1 --output demo/sample.jsonl

say "2. a tokenizer of 2,048 pieces"
[ -e demo/tokenizer ] || python tools/train_tokenizer.py --input demo/sample.jsonl --vocab-size 2048 --output demo/tokenizer

say "3. tokens: 95 % of the documents to train on, 5 % held out"
[ -e demo/data/sample.json ] || python tools/preprocess_data.py --input demo/sample.jsonl --tokenizer demo/tokenizer \
    --output-prefix demo/data/sample --held-out-fraction 0.05 --workers 2
python tools/inspect_data.py --prefix demo/data/sample --show 1

say "4. pretraining"
deepspeed --num_gpus 1 --master_port "${DEMO_PORT:-29531}" pretrain_ttl.py \
    --deepspeed_config configs/cpu.json --config configs/demo.toml

say "5. a Hugging Face model folder, checked against transformers"
[ -e demo/model ] || python tools/convert_to_hf.py --run demo/run --output demo/model

say "6. perplexity on the documents it never saw"
python tools/evaluate.py --model demo/model --perplexity demo/data/sample_heldout

say "7. text"
for prompt in "Era uma vez" "A professora" "Receita de"; do
    python tools/generate.py --model demo/model --prompt "$prompt" --max-new-tokens 64 --temperature 0.7 --seed 1
    echo
done

say "done"
python - <<'PYTHON'
import json
import numpy as np
from megatron_ttl.data.indexed_dataset import IndexedDataset

tokens = IndexedDataset("demo/data/sample").tokens
shares = np.bincount(tokens) / len(tokens)
entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
rows = [json.loads(line) for line in open("demo/run/metrics.jsonl")]
train = [row for row in rows if row["event"] == "train"]
held_out = [row for row in rows if row["event"] == "evaluation"][-1]["perplexity/demo/data/sample_heldout"]
print(f"{len(tokens):,} tokens; unigram entropy {entropy:.2f} nats per token, first loss {train[0]['loss']:.2f}, "
      f"last loss {train[-1]['loss']:.2f}, held-out perplexity {held_out:.2f}")
PYTHON

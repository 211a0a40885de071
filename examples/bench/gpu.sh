#!/usr/bin/env bash
# All measurements that need a GPU, one after the other: bash examples/bench/gpu.sh FOLDER
#
# Every line of the goals has its row; what fails leaves its log and stops nothing. FOLDER/report.md has the tables. About
# half an hour on one H100 without the grid; GRID=1 adds that (half an hour more, and it goes on where it was stopped).
# ONLY="step_460m kernels" takes some rows alone. SMALL=1 shrinks everything, to see on a CPU that it runs.
set -uo pipefail
out=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
mkdir -p "$out/profiles" "$out/data"

measure() {  # name, command: standard output is the result
    local name=$1
    shift
    [[ -z ${ONLY:-} || " $ONLY " == *" $name "* ]] || return 0
    echo "== $name: $*"
    if timeout "${LIMIT:-900}" "$@" > "$out/$name.part" 2> "$out/$name.log"; then
        mv "$out/$name.part" "$out/$name.json"
    else
        echo "   failed, see $out/$name.log"
    fi
}

profile() {  # name, micro batch, more keys: a machine profile
    local precision='"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}, '
    [[ -z ${SMALL:-} ]] || precision=
    printf '{"train_micro_batch_size_per_gpu": %s, %s"zero_optimization": {"stage": 1}%s}\n' "$2" "$precision" "${3:-}" \
        > "$out/profiles/$1.json"
}

small=()
if [[ -n ${SMALL:-} ]]; then
    small=(model.hidden_size=64 model.intermediate_size=128 model.num_hidden_layers=2 model.num_attention_heads=4
           model.num_key_value_heads=2 train.sequence_length=64)
fi

step() {  # name, run file, micro batch, tokens per step, profile's further keys, options ...
    local name=$1 config=$2 micro=$3 tokens=$4 keys=$5
    shift 5
    profile "$name" "$micro" "$keys"
    local shape=("train.tokens_per_step=$tokens")
    [[ -z ${SMALL:-} ]] || shape=("train.tokens_per_step=$((micro * 64))")
    measure "$name" python tools/bench.py step "${shape[@]}" "${small[@]}" --config "configs/$config.toml" \
        --deepspeed_config "$out/profiles/$name.json" --json "$@"
}

# What runs here, and whether it is right: the tests that nothing but a GPU can pass.
if [[ -z ${ONLY:-} || " $ONLY " == *" tests "* ]]; then
    echo "== tests: python -m pytest -m gpu"
    python tools/doctor.py > "$out/doctor.txt" 2>&1
    timeout "${LIMIT:-900}" python -m pytest -q -m gpu tests > "$out/tests.txt" 2>&1
    tail -n 1 "$out/tests.txt"
fi

# Each operation alone.
measure kernels python tools/bench.py kernels --json ${SMALL:+--tokens 64}

# A step of 262,144 tokens, and TTL's own of 8,192, against all peers: the goals.
step step_460m ttl_460m 16 262144 '' --steps 3 --warm-up 2
step step_460m_8k ttl_460m 4 8192 '' --steps 30 --warm-up 5
step step_160m ttl_160m 32 262144 '' --steps 4 --warm-up 2
step step_160m_8k ttl_160m 4 8192 '' --steps 30 --warm-up 5
step step_1b1 tinyllama_1b1 8 262144 '' --steps 3 --warm-up 2 --peer bare plain litgpt

# What else the step can be: DeepSpeed's engine, compiled blocks, recomputed norms and SwiGLU. Peer bare: without engine.
step step_460m_deepspeed ttl_460m 16 262144 ', "engine": "deepspeed"' --steps 3 --warm-up 2 --peer bare
step step_460m_compiled ttl_460m 16 262144 ', "compile": true' --steps 3 --warm-up 2 --peer bare
step step_460m_selective ttl_460m 16 262144 ', "recompute": "selective"' --steps 3 --warm-up 2 --peer bare

# The largest that must fit into 80 GB: peak memory.
step memory_460m ttl_460m 32 65536 '' --steps 3 --warm-up 1 --rounds 1 --peer bare
step memory_1b1 tinyllama_1b1 16 32768 '' --steps 3 --warm-up 1 --rounds 1 --peer bare

# The real command, with loader, clipping and logging, on a composed corpus; its last line of metrics is the result. The
# checkpoint becomes the model folder that generates.
data() {
    python examples/sample_corpus/compose.py --documents 4000 --seed 1 --output "$out/data/sample.jsonl" &&
        python tools/train_tokenizer.py --input "$out/data/sample.jsonl" --vocab-size 2048 --output "$out/data/tokenizer" &&
        python tools/preprocess_data.py --input "$out/data/sample.jsonl" --tokenizer "$out/data/tokenizer" \
            --output-prefix "$out/data/sample" --held-out-fraction 0.05
}
command_of() {  # name, run file, micro batch, tokens per step, steps
    local name=$1 config=$2 micro=$3 tokens=$4 steps=$5
    profile "$name" "$micro"
    [[ -z ${SMALL:-} ]] || tokens=$((micro * 64))
    rm -rf "$out/runs/$name"
    deepspeed --num_gpus 1 pretrain_ttl.py --deepspeed_config "$out/profiles/$name.json" --config "configs/$config.toml" \
        "run.dir=\"$out/runs/$name\"" "data.sources=[{prefix=\"$out/data/sample\"}]" "train.tokens_per_step=$tokens" \
        "train.steps=$steps" schedule.warmup_steps=5 "log.every_steps=$((steps / 2))" "checkpoint.every_steps=$steps" \
        "checkpoint.keep_every_steps=$steps" "evaluation.every_steps=$steps" train.gradient_clipping=1.0 \
        "evaluation.prefixes=[\"$out/data/sample_heldout\"]" evaluation.max_tokens=65536 \
        energy.enabled=false "${small[@]}" >&2 &&
        grep '"event": "train"' "$out/runs/$name/metrics.jsonl" | tail -n 1
}
if [[ -z ${ONLY:-} || $ONLY == *command* || $ONLY == *generate* ]]; then
    [[ -e $out/data/sample.json ]] || data > "$out/data/made.txt" 2>&1 || echo "   no data, see $out/data/made.txt"
fi
export -f command_of profile
export out SMALL=${SMALL:-}
real() {
    local quoted
    quoted=$(printf '%q ' "${small[@]}")
    measure "$1" bash -c "small=($quoted); command_of $*"
}
real command_460m ttl_460m 16 262144 20
real command_460m_8k ttl_460m 4 8192 200
real command_160m ttl_160m 32 262144 20
real command_160m_8k ttl_160m 4 8192 200
real command_1b1 tinyllama_1b1 8 262144 10

generated() {
    python tools/convert_to_hf.py --run "$out/runs/command_460m_8k" --output "$out/model_460m" --overwrite >&2 &&
        python tools/bench.py generate --model "$out/model_460m" --json ${SMALL:+--new-tokens 16 --batch 1 2}
}
export -f generated
measure generate bash -c generated

# Every way to compute TTL-160m's own step.
if [[ -n ${GRID:-} ]]; then
    profile grid 4
    tokens=8192
    [[ -z ${SMALL:-} ]] || tokens=256
    LIMIT=7200 measure grid python tools/bench.py grid "train.tokens_per_step=$tokens" "${small[@]}" --output "$out/grid" \
        --config configs/ttl_160m.toml --deepspeed_config "$out/profiles/grid.json" --steps 60 --json
fi

python tools/bench.py report --folder "$out"

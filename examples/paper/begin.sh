# Read by every script of this folder: where they work, what they say of what is missing, and how they end.
#
#   MODEL=   model folders (default: all of models/)         RUN=   run folders (default: all of runs/)
#   DATA=    folder with the files of tasks (tasks)          OUT=   where figures and tables go (report/paper)
#   LIMIT=   only so many questions of each task, for a trial
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
DATA=${DATA:-tasks} OUT=${OUT:-report/paper} done_steps=0

# Print the folders, two levels deep at most, that hold a file of this name: name, then where to look.
folders_with() {
    local name=$1
    shift
    find -L "$@" -mindepth 2 -maxdepth 2 -name "$name" 2>/dev/null | sed 's,/[^/]*$,,' | sort || true
}
[ -n "${MODEL:-}" ] || MODEL=$(folders_with config.json models)
[ -n "${RUN:-}" ] || RUN=$(folders_with metrics.jsonl runs)
read -r -a models <<< "${MODEL//$'\n'/ }" || true
read -r -a runs <<< "${RUN//$'\n'/ }" || true
limit=(${LIMIT:+--limit "$LIMIT"})

missing() { printf 'missing: %s\n' "$1" >&2; }

# Run a command and count it when it worked; a failure is said, and the script goes on with what is there.
attempt() {
    local code=0
    printf '\n== %s\n' "$*"
    "$@" || code=$?
    if [ "$code" = 130 ]; then exit 130; fi
    if [ "$code" = 0 ]; then done_steps=$((done_steps + 1)); else missing "the command above ended with code $code"; fi
    return 0
}

# Is there what this script needs? Say what and how to get it, if not.
needs() {
    if [ "$1" -eq 0 ] || [ ! -e "$2" ]; then missing "$3"; return 1; fi
}

have_models() { needs "${#models[@]}" "${models[0]:-}" "a model folder; tools/convert_to_hf.py makes one, or set MODEL"; }
have_runs() { needs "${#runs[@]}" "${runs[0]:-}" "a run folder; pretrain_ttl.py makes one, or set RUN"; }
have_data() { needs 1 "$DATA" "the folder $DATA; $1 --list says what belongs there, or set DATA"; }

# Print the paper's rows last and apart: nothing of them stands in a column of ours. Then end with 0 if anything was done.
finish() {
    local table
    for table in "$@"; do
        printf '\n'
        python tools/report.py --published "$table"
    done
    if [ "$done_steps" = 0 ]; then
        printf 'nothing was done; see what is missing above\n' >&2
        exit 2
    fi
}

# Score all models on some tasks, one after another so that one without data keeps none from being scored; then put side by
# side what came out.
score_table() {
    local model task scored=() known=()
    for model in ${models[@]+"${models[@]}"}; do
        for task in "$@"; do
            attempt python tools/evaluate.py --model "$model" --tasks "$task" --data "$DATA" ${limit[@]+"${limit[@]}"}
        done
        if [ -e "$model/scores.jsonl" ]; then scored+=("$model"); fi
    done
    if [ ${#scored[@]} -eq 0 ]; then return 0; fi
    for task in "$@"; do
        if grep -qs "\"task\": \"$task\"" "${scored[@]/%//scores.jsonl}"; then known+=("$task"); fi
    done
    if [ ${#known[@]} -gt 0 ]; then
        attempt python tools/scores.py "${scored[@]}" --tasks "$(IFS=,; printf %s "${known[*]}")" --format markdown
    fi
}

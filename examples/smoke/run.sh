#!/usr/bin/env bash
# Does it work here, with your model? About ten minutes on one GPU or one node: the first thing to run in a new
# container.
#
#   HF_MODEL=/models/Qwen2.5-1.5B MODEL=qwen2.5-1.5b GPUS_PER_NODE=1 bash examples/smoke/run.sh
#   HF_MODEL=/models/my-model TP=2 GPUS_PER_NODE=8 DATA=mine.jsonl bash examples/smoke/run.sh
#   HF_MODEL=/models/tiny TP=1 DEVICE=cpu GPUS_PER_NODE=1 bash examples/smoke/run.sh
#
# Trains ITERS (30) steps with ce and the same with idft, which is stopped half-way and started again, exports the
# result and compares it in transformers. Writes to OUT (./smoke-test), which a new run deletes; there must be room for
# about 40 bytes per parameter. --dry-run prints the plan of each training. The last line is PASS or FAIL.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../../launch/common.sh"
options "$@"

need HF_MODEL "the Hugging Face folder of the model to try"
OUT=${OUT:-$PWD/smoke-test}
ITERS=${ITERS:-30}
half=$((ITERS / 2))
export DEVICE=${DEVICE:-gpu} GPUS_PER_NODE=${GPUS_PER_NODE:-8} HF_MODEL ITERS
export SEQ_LENGTH=${SEQ_LENGTH:-512} GLOBAL_BATCH=${GLOBAL_BATCH:-16} LR=${LR:-1e-5} MAX_RESTARTS=0
if [ "$ITERS" -lt 10 ]; then fail "ITERS=$ITERS: at least 10, or nobody can tell whether the loss falls"; fi
find_interpreter
export PYTHON
check_inputs --hf-model "$HF_MODEL" --seq-length "$SEQ_LENGTH" ${TP:+--tensor-model-parallel-size "$TP"} ${DATA:+--data "$DATA"}

# train NAME FLAG…: launch/train.sh into OUT/NAME, its output in OUT/NAME.log
train() {
    local name=$1 log
    shift
    if [ -n "$dry_run" ]; then
        CHECK_INPUTS=no SFT_LOSS=$name SAVE=$OUT/$name bash "$launch_dir/train.sh" --dry-run "$@"
        return
    fi
    echo "== $name $*"
    log=$OUT/$name-$(find "$OUT" -maxdepth 1 -name "$name-*.log" | wc -l).log
    if ! SFT_LOSS=$name SAVE=$OUT/$name bash "$launch_dir/train.sh" "$@" >"$log" 2>&1; then
        tail -n 25 "$log"
        echo "FAIL: the training above; all its output is in $log"
        exit 1
    fi
}

if [ -z "$dry_run" ]; then
    if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -e "$OUT/smoke-test" ]; then
        fail "$OUT holds something else: choose another folder with OUT"
    fi
    rm -rf "$OUT"
    mkdir -p "$OUT"
    touch "$OUT/smoke-test"
    OUT=$(cd "$OUT" && pwd)
    "$PYTHON" -m megatron_idft doctor
    "$PYTHON" "$here/make_records.py" "$OUT"
fi
export DATA=${DATA:-$OUT/train.jsonl} VALID_DATA=$OUT/valid.jsonl SAVE_INTERVAL=1000000
cache=(--sft-cache "$OUT/cache") # not beside your data

SAVE_HF=no train ce "${cache[@]}" --no-save-optim --no-save-rng "${flags[@]}"
train idft "${cache[@]}" "${flags[@]}" --exit-interval "$half"
train idft "${cache[@]}" "${flags[@]}" # the same command: it goes on from the checkpoint
if [ -n "$dry_run" ]; then exit; fi

"$PYTHON" "$here/check.py" "$OUT" --iterations "$ITERS" --stopped-at "$half" \
    --seq-length "$SEQ_LENGTH" --device "$DEVICE"

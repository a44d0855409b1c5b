#!/usr/bin/env bash
# A corpus of three sources scored under a model, linted, filtered and trained on; on a CPU, in minutes.
#   bash examples/score/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# RECORDS (of each source), STEPS (of the model's training) and TUNE_STEPS (of each fine-tune; 0 ends the run before)
# change the sizes, PROCESSES those of the model's training.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
out=$checkout/.cache/score-example
fresh=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --fresh) fresh=yes; shift ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "run.sh: unknown argument $1; --help lists what there is" >&2; exit 2 ;;
    esac
done
records=${RECORDS:-240} steps=${STEPS:-500} tune_steps=${TUNE_STEPS:-24} processes=${PROCESSES:-2}
python=${PYTHON:-$checkout/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "run.sh: there is no $python: bash tests/run.sh or bash launch/quickstart.sh makes it, or set PYTHON" >&2
    exit 1
fi
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
export OMP_NUM_THREADS=1 PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"

# ------------------------------------------------------------------------------------------------- the parts of a stage

started=$SECONDS
say() { printf '[%3d s] %s\n' $((SECONDS - started)) "$*"; }

# logged LOG FILTER COMMAND…: all output goes to LOG, the lines that the sed script FILTER prints go to the terminal.
logged() {
    local log=$1 filter=$2
    shift 2
    if ! "$@" 2>&1 | tee "$log" | sed -unE "$filter"; then
        # Without what torchrun says at the end about processes that were stopped: the reason stands before it.
        sed '/torch.distributed.elastic/,$d' "$log" | tail -n 15 >&2
        echo "run.sh: this stage failed; all its output is in $PWD/$log. Start again to go on from here." >&2
        exit 1
    fi
}

# both PID PID: wait for two stages that run side by side, and fail if one of them did.
both() {
    local failed=
    wait "$1" || failed=yes
    wait "$2" || failed=yes
    if [ -n "$failed" ]; then exit 1; fi
}

idft() { "$python" -m megatron_idft "$@"; }
launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" -m megatron_idft "${@:2}"; }

progress='s|^.* sft iteration +([0-9]+)/ +([0-9]+) .*sft loss: ([^ ]+) .*phi mean: ([^ ]+) .*phi std: ([^ ]+) .*|'
progress+='        step \1 of \2   objective \3   phi mean \4   phi std \5|p'
scored='s/^> ((own samples|[0-9,]+ records, ).*)/        \1/p'

# train PROCESSES NAME FLAG…: Megatron's trainer into the folder NAME; a checkpoint there is continued.
train() {
    local processes=$1 name=$2
    shift 2
    if [ -e "$name/done" ]; then return; fi
    logged "$name.log" "$progress" launch "$processes" train --cpu --save "$name" --load "$name" --save-interval 100 \
        --micro-batch-size 16 --lr-warmup-fraction 0.05 --lr-decay-style cosine --clip-grad 1.0 \
        --weight-decay 0.01 --num-workers 0 --seed 1 "$@"
    touch "$name/done"
}

# ----------------------------------------------------------------------------------------------------------- the stages

version="$(cat "$here"/run.sh "$here"/*.py | cksum) $records $steps $tune_steps"
if [ -d "$out" ] && [ ! -e "$out/version" ] && [ -n "$(ls -A "$out")" ]; then
    echo "run.sh: $out holds something else; choose another folder with --out" >&2
    exit 1
fi
if [ -n "$fresh" ]; then rm -rf "$out"; fi
if [ -e "$out/version" ] && [ "$version" != "$(cat "$out/version")" ]; then
    echo "run.sh: $out was begun by another version or size of this example; --fresh starts over, --out keeps both" >&2
    exit 1
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
echo "$version" >"$out/version"
cd "$out"

say "1. corpora, a model with random weights, and a short training that gives it a style of its own"
if [ ! -e blank/model.safetensors ]; then
    logged data.log 's/^/        /p' "$python" "$here/make_data.py" data --records "$records"
    logged blank.log 's/^(blank: .*)/        \1/p' \
        "$python" "$here/make_model.py" blank data/train.jsonl data/corpus.jsonl
fi
train "$processes" base --hf-model blank --sft-loss ce --sft-data data/train.jsonl --seq-length 64 \
    --train-iters "$steps" --global-batch-size 64 --lr 3e-3 --min-lr 1e-4 --log-interval 100 --save-hf final
if [ ! -e model ]; then # of all that follows
    rm -rf model.partial
    cp -r "$(printf 'base/hf/iter_%07d' "$steps")" model.partial
    mv model.partial model
fi

# What --hf-model does by itself, once by hand: a checkpoint for any Megatron script, its flags, and the way back.
say "2. to Megatron and back"
if [ ! -e megatron ]; then
    logged convert.log 's/^megatron: /        &/p' idft convert to-megatron model megatron
fi
if [ ! -e back ]; then
    logged convert-back.log 's/^back: /        &/p' idft convert to-hf megatron back
fi
sed 's/^/        /' megatron/model_flags.sh
cmp model/model.safetensors back/model.safetensors
echo "        model/ and back/ hold the same weights, byte for byte"

# The launches share the chunks, and then the two temperatures at which the model answers prompts itself; either could
# be killed and started again.
say "3. scoring by two launches on one folder, with the model's own answers as the measure"
score=(score --cpu --hf-model model --data data/corpus.jsonl --seq-length 96 --chunk-records 48)
own_samples=(--calibrate-max-tokens 64 --calibrate)
last_part=own_samples/parts/chunk-000001.parquet
if [ ! -e "scores/$last_part" ]; then
    logged score-first.log "$scored" launch 1 "${score[@]}" --output scores "${own_samples[@]}" 200 &
    first=$!
    logged score-second.log "$scored" launch 1 "${score[@]}" --output scores "${own_samples[@]}" 200 &
    both "$first" $!
fi
idft score status scores | sed 's/^/        /'
idft score report scores --title "Three sources under the model" | sed 's/^/        /'

say "4. what fits: near the model, complete, and without the prompt in the answer"
keep="phi_mean > -0.5 and phi_std < 1 and ends_turn and not truncated and prompt_overlap < 0.2"
if [ ! -e fitting.jsonl ]; then
    idft score select scores --keep "$keep" --data data/corpus.jsonl --output fitting.jsonl | sed 's/^/        /'
fi
for source in own foreign broken; do
    printf '        %-8s %5d scored, %5d kept\n' "$source" "$(grep -c "\"source\": \"$source\"" data/corpus.jsonl)" \
        "$(grep -c "\"source\": \"$source\"" fitting.jsonl || true)"
done

if [ "$tune_steps" -eq 0 ]; then exit; fi

say "5. fine-tuning with IDFT on the selection and on everything, side by side"
tune=(--hf-model model --sft-loss idft --seq-length 96 --train-iters "$tune_steps" --global-batch-size 32 --lr 3e-4
    --log-interval "$tune_steps" --save-hf final)
train 1 tuned-fitting "${tune[@]}" --sft-data fitting.jsonl &
first=$!
train 1 tuned-everything "${tune[@]}" --sft-data data/corpus.jsonl &
both "$first" $!

say "6. the corpus under both tuned models, and three checkpoints in one report"
for name in fitting everything; do
    if [ ! -e "scores-$name/$last_part" ]; then
        logged "score-$name.log" "$scored" launch 1 "${score[@]}" --load "tuned-$name" --output "scores-$name" \
            "${own_samples[@]}" 100 &
    else
        true &
    fi
    if [ "$name" = fitting ]; then first=$!; fi
done
both "$first" $!
idft score report scores scores-fitting scores-everything --output compared --title "Before and after" |
    sed 's/^/        /'
say "done. Open $out/scores/report.html, then $out/compared/report.html; start over: --fresh"

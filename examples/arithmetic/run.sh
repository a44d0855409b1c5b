#!/usr/bin/env bash
# From nothing to a comparison of fine-tuning losses, on a CPU: data, tokenizer, base model, fine-tunes, table and plot.
#   bash examples/arithmetic/run.sh [--out FOLDER] [--seeds "1 2 3"] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
out=$checkout/.quickstart
seeds=(1)
fresh=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --seeds) read -ra seeds <<<"${2:?--seeds needs numbers}"; shift 2 ;;
        --fresh) fresh=yes; shift ;;
        -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "run.sh: unknown argument $1; --help lists what there is" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-$checkout/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "run.sh: there is no $python: bash launch/quickstart.sh makes it, or set PYTHON" >&2
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

launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$@"; }

# One line per log interval out of Megatron's many; what another process printed may stand in front of it.
progress='s|^.* sft iteration +([0-9]+)/ +([0-9]+) .*sft loss: ([^ ]+) .*phi mean: ([^ ]+) .*phi std: ([^ ]+) .*|'
progress+='        step \1 of \2   objective \3   phi mean \4   phi std \5|p'

# train NAME FLAG…: Megatron's trainer by megatron-idft, into the folder NAME. A checkpoint there is continued.
train() {
    local name=$1
    shift
    if [ -e "$name/done" ]; then say "$name: done before"; return; fi
    say "$name: training (log in $PWD/$name.log)"
    logged "$name.log" "$progress" launch -m megatron_idft train --cpu \
        --tokenizer-model tokenizer.model --chat-template chatml \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 \
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
        --attention-dropout 0 --hidden-dropout 0 --weight-decay 0.01 --clip-grad 1.0 --lr-decay-style cosine \
        --save "$name" --load "$name" --save-interval 100 --log-interval 50 --num-workers 0 --seed "$seed" "$@"
    touch "$name/done"
}

# ----------------------------------------------------------------------------------------------------------- the stages

version=$(cat "$here"/run.sh "$here"/problems.py "$here"/generate.py "$here"/train_tokenizer.py | cksum)
if [ -d "$out" ] && [ ! -e "$out/version" ] && [ -n "$(ls -A "$out")" ]; then
    echo "run.sh: $out holds something else; choose another folder with --out" >&2
    exit 1
fi
if [ -n "$fresh" ]; then rm -rf "$out"; fi
if [ -e "$out/version" ] && [ "$version" != "$(cat "$out/version")" ]; then
    echo "run.sh: $out was begun by another version of this example; --fresh starts over, --out keeps both" >&2
    exit 1
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
echo "$version" >"$out/version"

for seed in "${seeds[@]}"; do
    mkdir -p "$out/seed-$seed"
    cd "$out/seed-$seed"

    say "seed $seed: corpora and tokenizer"
    if [ ! -e tokenizer.model ]; then
        logged data.log p "$python" "$here/generate.py" data --seed "$seed"
        logged tokenizer.log p "$python" "$here/train_tokenizer.py" tokenizer.model data/base-train.jsonl data/foreign-train.jsonl
    fi

    # The base model, from random weights, by plain cross-entropy. Two data-parallel processes.
    train base --sft-loss ce --sft-data data/base-train.jsonl --sft-valid-data data/addition-own.jsonl \
        --train-epochs 4 --micro-batch-size 32 --global-batch-size 64 \
        --lr 2e-3 --min-lr 2e-4 --lr-warmup-fraction 0.05

    # Fine-tunes: the same start, records in the same order, the same learning rates; only the loss differs. Two
    # tensor-parallel processes, each with half of every matrix and half of the vocabulary.
    models=(base=base)
    for lr in 5e-5 2e-4; do
        for loss in ce dft idft; do
            train "$loss-$lr" --sft-loss "$loss" --tensor-model-parallel-size 2 --pretrained-checkpoint base \
                --sft-data data/foreign-train.jsonl --sft-valid-data data/subtraction-foreign.jsonl \
                --train-epochs 2 --micro-batch-size 32 --global-batch-size 32 --lr "$lr" --lr-warmup-fraction 0.1
            models+=("$loss-$lr=$loss-$lr")
        done
    done

    if [ ! -e results.json ]; then
        say "seed $seed: answering held-out problems with each model (log in $PWD/evaluate.log)"
        logged evaluate.log 's/^evaluated /        /p' launch "$here/evaluate.py" --cpu --out results.json \
            --models "${models[@]}" --decode data/addition-own.jsonl data/subtraction-own.jsonl \
            --score data/addition-own.jsonl data/subtraction-foreign.jsonl \
            --use-checkpoint-args --load base --no-load-optim --no-load-rng --micro-batch-size 1 \
            --tokenizer-model tokenizer.model --chat-template chatml
    fi
done

"$python" "$here/report.py" "$out" --seeds "${seeds[@]}"
say "done. Other seeds: --seeds \"1 2 3\"; start over: --fresh, or delete $out"

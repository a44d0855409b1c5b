#!/usr/bin/env bash
# From nothing to a comparison of fine-tuning losses, on a CPU: data, tokenizer, base model, fine-tunes, table and plot.
#   bash examples/arithmetic/run.sh [--out FOLDER] [--seeds "1 2 3"] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
seeds=(1)
option() {
    case $1 in
        --seeds) read -ra seeds <<<"${2:?--seeds needs numbers}" ;;
        *) return 1 ;;
    esac
}
arguments "$checkout/.cache/arithmetic-example" "$@"
enter_folder ""

model=(--tokenizer-model tokenizer.model --chat-template chatml
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --log-interval 50)

for seed in "${seeds[@]}"; do
    mkdir -p "$out/seed-$seed"
    cd "$out/seed-$seed"

    say "seed $seed: corpora and tokenizer"
    if [ ! -e tokenizer.model ]; then
        logged data.log p "$python" "$here/generate.py" data --seed "$seed"
        logged tokenizer.log p "$python" "$here/train_tokenizer.py" tokenizer.model \
            data/base-train.jsonl data/foreign-train.jsonl
    fi

    # The base model, from random weights, by plain cross-entropy. Two data-parallel processes.
    say "seed $seed: the base model (log in $PWD/base.log)"
    train 2 base "${model[@]}" --seed "$seed" --sft-loss ce \
        --sft-data data/base-train.jsonl --sft-valid-data data/addition-own.jsonl --train-epochs 4 \
        --micro-batch-size 32 --global-batch-size 64 --lr 2e-3 --min-lr 2e-4 --lr-warmup-fraction 0.05

    # Fine-tunes: the same start, records in the same order, the same learning rates; only the loss differs. Two
    # tensor-parallel processes, each with half of every matrix and half of the vocabulary.
    models=(base=base)
    for lr in 5e-5 2e-4; do
        for loss in ce dft idft; do
            say "seed $seed: $loss at learning rate $lr (log in $PWD/$loss-$lr.log)"
            train 2 "$loss-$lr" "${model[@]}" --seed "$seed" --sft-loss "$loss" \
                --tensor-model-parallel-size 2 --pretrained-checkpoint base \
                --sft-data data/foreign-train.jsonl --sft-valid-data data/subtraction-foreign.jsonl \
                --train-epochs 2 --micro-batch-size 32 --global-batch-size 32 --lr "$lr" --lr-warmup-fraction 0.1
            models+=("$loss-$lr=$loss-$lr")
        done
    done

    if [ ! -e results.json ]; then
        say "seed $seed: answering held-out problems with each model (log in $PWD/evaluate.log)"
        logged evaluate.log 's/^evaluated /        /p' launch 2 "$here/evaluate.py" --cpu --out results.json \
            --models "${models[@]}" --decode data/addition-own.jsonl data/subtraction-own.jsonl \
            --score data/addition-own.jsonl data/subtraction-foreign.jsonl \
            --use-checkpoint-args --load base --no-load-optim --no-load-rng --micro-batch-size 1 \
            --tokenizer-model tokenizer.model --chat-template chatml
    fi
done

"$python" "$here/report.py" "$out" --seeds "${seeds[@]}"
say "done. Other seeds: --seeds \"1 2 3\"; start over: --fresh, or delete $out"

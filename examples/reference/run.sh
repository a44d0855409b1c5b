#!/usr/bin/env bash
# Objectives anchored in a reference, with a pretrained model on real problems, on a CPU: score, prepare, train.
#   bash examples/reference/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# PROBLEMS (of which the short ones are taken), ANSWERS (to each question), STEPS, LR and OBJECTIVES change the run.
# MODEL=FOLDER takes another Hugging Face folder, KEEP=FILE other records for what shall not be forgotten.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$checkout/.cache/reference-example" "$@"
problems=${PROBLEMS:-320} answers=${ANSWERS:-3} steps=${STEPS:-24} lr=${LR:-3e-5} length=128
read -ra objectives <<<"${OBJECTIVES:-ce dft prift asft}"
model=${MODEL:-$checkout/.cache/real_model/SmolLM2-135M-Instruct}
answers_file=answers.jsonl
if [ -n "${KEEP:-}" ]; then answers_file=$(realpath "$KEEP"); fi
enter_folder "$problems $answers $steps $lr $model $answers_file" # more objectives may follow

say "1. a pretrained model, short grade-school problems, and its own answers to questions of another kind"
if [ -z "${MODEL:-}" ]; then
    logged model.log 's/^(downloading|converting) .*/        &/p' "$python" "$checkout/examples/real_model/fetch.py"
fi
if [ ! -e problems/origin.json ]; then
    logged problems.log d "$python" "$checkout/examples/real_model/problems.py" problems \
        --train "$problems" --validation $((problems / 2)) --held-out 0
fi
questions=("Name three colours of the rainbow." "Write one sentence about the sea."
    "Say good morning to a friend in one sentence." "What is the capital of France? Answer in one sentence."
    "Write a short thank-you note for a gift." "Why is sleep important? Answer in two sentences.")
if [ ! -e "$answers_file" ]; then
    printf '{"messages": [{"role": "user", "content": "%s"}]}\n' "${questions[@]}" >questions.jsonl
    logged answers.log 's/^> records: .*/        &/p' launch 2 -m megatron_idft realign --cpu --hf-model "$model" \
        --sft-data questions.jsonl --output answers --regenerate --rollout-samples "$answers" --max-new-tokens 64 \
        --seq-length "$length" --chunk-records 3
    logged answers-merge.log d idft realign merge answers --output "$answers_file"
fi

say "2. score: what the model says of the solutions before any training: log q, and its 20 most probable tokens"
corpus=(--sft-truncation drop --seq-length "$length")
if [ ! -e scores/scores.parquet ]; then
    logged score.log 's/^> [0-9,]+ records, .*/        &/p' launch 2 -m megatron_idft score --cpu --hf-model "$model" \
        --sft-data problems/train.jsonl "${corpus[@]}" --output scores --chunk-records 8 --sft-reference-top-k 20
fi

say "3. prepare: the scores become columns beside the packs"
prepare() { # NAME FILE FLAG…
    if [ ! -e "packs/$1.json" ]; then
        logged "prepare-$1.log" d idft prepare --tokenizer-model "$model" "${corpus[@]}" --output "packs/$1" \
            --sft-data "${@:2}"
    fi
}
mkdir -p packs
prepare train problems/train.jsonl --sft-reference scores --sft-reference-top-k 20
prepare problems problems/validation.jsonl
prepare answers "$answers_file"
tokens=$(($(wc -c <packs/train.bin) / 4)) # their ids are of 4 bytes
for column in packs/train.reference*.bin; do
    bytes=$(wc -c <"$column")
    echo "        $column: $bytes bytes, $((bytes / tokens)) for each of $tokens tokens"
done

# The same model, packs, order and learning rates; only the objective differs. `ce` and `dft` are taken as the anchored
# objectives without their anchor, which report the distance to the reference.
flags() {
    case $1 in
        ce) echo --sft-loss sft_k3 --anchor-coefficient 0 ;;
        dft) echo --sft-loss asft --anchor-coefficient 0 ;;
        *) echo --sft-loss "$1" ;;
    esac
}
compare() { # OBJECTIVE
    read -ra loss <<<"$(flags "$1")"
    train 1 "$1" --hf-model "$model" "${loss[@]}" --sft-data packs/train --seq-length "$length" \
        --sft-valid-data problems=packs/problems answers=packs/answers --train-iters "$steps" --micro-batch-size 1 \
        --global-batch-size 1 --lr "$lr" --lr-warmup-iters 2 --log-interval 1 --seed 1 --no-save-optim --no-save-rng \
        --tensorboard-dir "$1/tensorboard" | sed -nE "s/^ +(step (1|$steps) of .*)/        $1: \1/p"
}
say "4. train: $steps steps with each of ${objectives[*]}, two at a time"
for ((i = 0; i < ${#objectives[@]}; i += 2)); do
    compare "${objectives[i]}" &
    first=$!
    if [ -n "${objectives[i + 1]:-}" ]; then compare "${objectives[i + 1]}" & fi
    both "$first" $!
done

"$python" "$here/table.py" . "${objectives[@]}" | sed 's/^/        /'
say "done, in $out; again from the beginning: --fresh"

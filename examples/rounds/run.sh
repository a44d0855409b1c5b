#!/usr/bin/env bash
# Realign, train, and realign again with the trained model, round after round, until held-out numbers fall.
#   bash examples/rounds/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# ROUNDS (at most), ERRORS (how many standard errors a fall is), STEPS (of each round's training) and SEQ_LENGTH change
# the run. Without more it makes a small model and sums, as examples/realign does (RECORDS, HELD_OUT_RECORDS). With
#   MODEL=FOLDER TRAIN=FILE HELD_OUT=FILE HINT=solve-again LR=1e-5
# it takes a Hugging Face folder, records to realign, records that nothing trains on, and a prompt of the hint.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$checkout/.cache/rounds-example" "$@"
rounds=${ROUNDS:-3} errors=${ERRORS:-2} steps=${STEPS:-40} seq_length=${SEQ_LENGTH:-96} lr=${LR:-1e-4}
records=${RECORDS:-480} held_out_records=${HELD_OUT_RECORDS:-240} max_new_tokens=${MAX_NEW_TOKENS:-64}
hint=${HINT:-$checkout/examples/realign/hint.txt}
absolute() { if [ -e "$1" ]; then realpath "$1"; else echo "$1"; fi; }
if [ -n "${MODEL:-}" ]; then
    model=$(absolute "$MODEL") train_data=$(absolute "${TRAIN:?MODEL needs TRAIN=FILE}")
    held_out=$(absolute "${HELD_OUT:?MODEL needs HELD_OUT=FILE}")
else
    model=model train_data=data/corpus.jsonl held_out=data/held-out.jsonl
fi
hint=$(absolute "$hint")
# How many rounds there are may change: the earlier ones stay.
enter_folder "$errors $steps $seq_length $lr $records $held_out_records $max_new_tokens $model $train_data $held_out $hint"

if [ "$model" = model ] && [ ! -e model ]; then
    say "a model that adds in a style of its own, often wrongly, and another author's sums"
    if [ ! -e blank/model.safetensors ]; then
        logged data.log d "$python" "$checkout/examples/realign/make_data.py" data \
            --records $((records + held_out_records)) --held-out 1
        tail -n "$held_out_records" data/corpus.jsonl >data/held-out.jsonl
        head -n "$records" data/corpus.jsonl >data/first.jsonl
        mv data/first.jsonl data/corpus.jsonl
        logged blank.log d "$python" "$checkout/examples/make_model.py" blank data/train.jsonl data/corpus.jsonl
    fi
    train 2 base --hf-model blank --sft-loss ce --sft-data data/train.jsonl --seq-length 88 --train-iters 420 \
        --micro-batch-size 16 --global-batch-size 64 --lr 3e-3 --min-lr 1e-4 --lr-warmup-fraction 0.05 --seed 1 \
        --log-interval 140 --save-hf final
    cp -r base/hf/iter_0000420 model.partial
    mv model.partial model
fi

# model_of ROUND: the Hugging Face folder that a round ends with; round 0 is the model before any.
model_of() { if [ "$1" = 0 ]; then echo "$model"; else printf 'round-%d/tuned/hf/iter_%07d' "$1" "$steps"; fi; }

# realign MODEL DATA FOLDER SEED
realign() {
    if [ -e "$3/report.json" ]; then return; fi
    logged "$3.log" d launch 1 -m megatron_idft realign --cpu --hf-model "$1" --sft-data "$2" --output "$3" --seed "$4" \
        --seq-length "$seq_length" --max-new-tokens "$max_new_tokens" --hint-prompt "$hint" --chunk-records 120
    logged "$3.report.log" d idft realign report "$3"
}

# The verified share is that of own responses to the held-out questions, drawn with one seed in every round. phi is that
# of the right responses that round 0 gave to them: the same texts under every model.
evaluate() { # ROUND
    realign "$(model_of "$1")" "$held_out" "round-$1/held-out" 1
    if [ ! -e right.jsonl ]; then
        logged merge.log d idft realign merge round-0/held-out --output right.jsonl
    fi
    if [ ! -e "round-$1/scores/report.json" ]; then
        logged "round-$1/scores.log" d launch 1 -m megatron_idft score --cpu --hf-model "$(model_of "$1")" \
            --sft-data right.jsonl --seq-length "$seq_length" --chunk-records 120 --output "round-$1/scores"
        logged "round-$1/scores.report.log" d idft score report "round-$1/scores"
    fi
}

# Exit code 0: go on; 3: stop, with a line that says why.
decide() { "$python" "$here/decide.py" . "$1" --errors "$errors" --model "$(model_of "$1")"; }

mkdir -p round-0
say "round 0: the model before any training"
evaluate 0
if ! decide 0; then exit 1; fi
for ((round = 1; round <= rounds; round++)); do
    before=$(model_of $((round - 1)))
    mkdir -p "round-$round"
    say "round $round: realigning with $before"
    realign "$before" "$train_data" "round-$round/realigned" "$round"
    if [ ! -e "round-$round/realigned.jsonl" ]; then
        logged "round-$round/merge.log" d idft realign merge "round-$round/realigned" \
            --output "round-$round/realigned.jsonl"
    fi
    if [ ! -s "round-$round/realigned.jsonl" ]; then
        say "stopped: round $round kept no record, so there is nothing to train on; see round-$round/realigned/report.html"
        exit 1
    fi
    say "round $round: training"
    train 1 "round-$round/tuned" --hf-model "$before" --sft-loss idft --sft-data "round-$round/realigned.jsonl" \
        --seq-length "$seq_length" --train-iters "$steps" --micro-batch-size 16 --global-batch-size 32 --lr "$lr" \
        --lr-warmup-fraction 0.05 --seed "$round" --log-interval "$steps" --save-hf final
    say "round $round: its model on what nothing was trained on"
    evaluate "$round"
    code=0
    decide "$round" || code=$?
    if [ "$code" = 3 ]; then break; fi
    if [ "$code" != 0 ]; then exit "$code"; fi
done
say "done, in $out: rounds.json holds the table; ROUNDS=N with a larger N goes on; start over: --fresh"

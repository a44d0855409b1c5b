#!/usr/bin/env bash
# A corpus of another author, realigned to a model by Hinted Decoding and trained on; on a CPU, in minutes.
#   bash examples/realign/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# RECORDS (of the corpus), HELD_OUT (of each test), LARGEST (of the numbers), STEPS and BATCH (of the model's training),
# TUNE_STEPS (of each fine-tune) and MIX_RECORDS (0: step 4 is left out) change the sizes, PROCESSES those of the
# model's training.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$checkout/.cache/realign-example" "$@"
records=${RECORDS:-960} held_out=${HELD_OUT:-480} largest=${LARGEST:-99} steps=${STEPS:-420} batch=${BATCH:-64}
tune_steps=${TUNE_STEPS:-60} mix_records=${MIX_RECORDS:-240} processes=${PROCESSES:-2}
enter_folder "$records $held_out $largest $steps $batch $tune_steps $mix_records"

chunk=$(((records + 7) / 8)) # records that a launch takes at a time: both launches have something to do
training=(--micro-batch-size 16 --lr-warmup-fraction 0.05 --seed 1 --save-hf final)
scored='s/^> ((own samples|[0-9,]+ records, ).*)/        \1/p'

say "1. corpora, and a model that adds in a style of its own, often wrongly, and has learned to use a hint"
if [ ! -e blank/model.safetensors ]; then
    logged data.log 's/^/        /p' "$python" "$here/make_data.py" data \
        --records "$records" --held-out "$held_out" --largest "$largest"
    logged blank.log 's/^(blank: .*)/        \1/p' \
        "$python" "$checkout/examples/make_model.py" blank data/train.jsonl data/corpus.jsonl
fi
train "$processes" base "${training[@]}" --hf-model blank --sft-loss ce --sft-data data/train.jsonl --seq-length 88 \
    --train-iters "$steps" --global-batch-size "$batch" --lr 3e-3 --min-lr 1e-4 --log-interval 140
if [ ! -e model ]; then # of all that follows
    rm -rf model.partial
    cp -r "$(printf 'base/hf/iter_%07d' "$steps")" model.partial
    mv model.partial model
fi

say "2. the corpus as it is, beside the model's own answers"
score=(-m megatron_idft score --cpu --hf-model model --seq-length 96 --chunk-records "$chunk")
if [ ! -e scores/scores.parquet ]; then
    logged score.log "$scored" launch 1 "${score[@]}" --sft-data data/corpus.jsonl --output scores \
        --calibrate-max-tokens 64 --calibrate 200
fi

# Of each record: a response of the model's own, verified; where that is wrong, one by hinted decoding, verified; where
# that is wrong too, twice again with less of the plain stream; what is wrong then, or states no answer, is left out.
# From " answer" on only the plain stream writes: the sum must follow from the columns, not be copied from the hint.
say "3. realigning it by two launches on one folder"
realign=(-m megatron_idft realign --cpu --hf-model model --sft-data data/corpus.jsonl --seq-length 96 --seed 1
    --max-new-tokens 64 --hint-prompt "$here/hint.txt" --splitter " answer")
if [ ! -e realigned.jsonl ]; then
    shared=("${realign[@]}" --output realigned --chunk-records "$chunk")
    logged realign-first.log d launch 1 "${shared[@]}" &
    first=$!
    logged realign-second.log d launch 1 "${shared[@]}" &
    both "$first" $!
    idft realign merge realigned --output realigned.jsonl | sed 's/^/        merged: /'
fi
idft realign status realigned | sed 's/^/        /'
idft realign report realigned --title "Another author's additions, realigned" | sed 's/^/        /'
kept=$(head -n 1 realigned.jsonl | grep -o '"id": "[^"]*"')
grep -F "$kept" data/corpus.jsonl | cut -c 1-110 | sed 's/^/        before: /'
head -n 1 realigned.jsonl | cut -c 1-150 | sed 's/^/        after:  /'

# On the first records, all of them decoded from two streams. The hint share is that of the hinted one: 1 is
# self-distillation from the hinted stream, 0 is plain sampling; by entropy it is small where the hint leaves a choice.
mix() { # NAME FLAG…
    if [ -e "mixed-$1/report.json" ]; then return; fi
    logged "mixed-$1.log" d launch 1 "${realign[@]}" --output "mixed-$1" --limit "$mix_records" \
        --rollout-samples 0 "${@:2}"
    idft realign report "mixed-$1" --title "Streams mixed: $1" | sed 's/^/        /'
}
if [ "$mix_records" -gt 0 ]; then
    say "4. how the streams are mixed: by a fixed hint share, and by entropy"
    mix hinted --mix fixed --hint-share 1 &
    first=$!
    mix plain --mix fixed --hint-share 0 --first-token mixed &
    both "$first" $!
    mix entropy --mix linear --mix-slope 3
fi

say "5. the realigned corpus under the same model"
if [ ! -e scores-realigned/scores.parquet ]; then
    logged score-realigned.log "$scored" launch 1 "${score[@]}" --sft-data realigned.jsonl --output scores-realigned
fi
idft score report scores scores-realigned --output compared --title "Before and after" | sed 's/^/        /'

# realigned.jsonl holds the token ids that were drawn, and these are trained on; nothing is tokenized again.
say "6. fine-tuning with IDFT on both, side by side"
tune=("${training[@]}" --hf-model model --sft-loss idft --seq-length 64 --train-iters "$tune_steps"
    --global-batch-size 32 --lr 1e-4 --log-interval "$tune_steps")
train 1 tuned-original "${tune[@]}" --sft-data data/corpus.jsonl &
first=$!
train 1 tuned-realigned "${tune[@]}" --sft-data realigned.jsonl &
both "$first" $!
grep -h "pre-tokenized" tuned-realigned.log | sed 's/^ */        /'

say "7. sums that nothing was trained on, and the skill that no fine-tune trained"
if [ ! -e answers.json ]; then
    tuned=$(printf 'hf/iter_%07d' "$tune_steps")
    logged answers.log '/^(base|original|realigned): /s/^/        /p' "$python" "$here/evaluate.py" --models \
        base=model "original=tuned-original/$tuned" "realigned=tuned-realigned/$tuned" \
        --data data/sums.jsonl data/larger.jsonl --out answers.json
fi
logged table.txt p "$python" "$here/table.py" .
say "done. Open $out/realigned/report.html, then $out/compared/report.html; start over: --fresh"

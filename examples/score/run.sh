#!/usr/bin/env bash
# A corpus of three sources scored under a model, linted, filtered and trained on; on a CPU, in minutes.
#   bash examples/score/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# RECORDS (of each source), STEPS and BATCH (of the model's training) and TUNE_STEPS (of each fine-tune; 0 ends the run
# before) change the sizes, PROCESSES those of the model's training.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$checkout/.cache/score-example" "$@"
records=${RECORDS:-240} steps=${STEPS:-500} batch=${BATCH:-64} tune_steps=${TUNE_STEPS:-24} processes=${PROCESSES:-2}

scored='s/^> ((own samples|[0-9,]+ records, ).*)/        \1/p'
training=(--micro-batch-size 16 --lr-warmup-fraction 0.05 --seed 1)

enter_folder "$records $steps $batch $tune_steps"

say "1. corpora, a model with random weights, and a short training that gives it a style of its own"
if [ ! -e blank/model.safetensors ]; then
    logged data.log 's/^/        /p' "$python" "$here/make_data.py" data --records "$records"
    logged blank.log 's/^(blank: .*)/        \1/p' \
        "$python" "$checkout/examples/make_model.py" blank data/train.jsonl data/corpus.jsonl
fi
train "$processes" base "${training[@]}" --hf-model blank --sft-loss ce --sft-data data/train.jsonl --seq-length 64 \
    --train-iters "$steps" --global-batch-size "$batch" --lr 3e-3 --min-lr 1e-4 --log-interval 100 --save-hf final
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
score=(-m megatron_idft score --cpu --hf-model model --sft-data data/corpus.jsonl --seq-length 96 --chunk-records 48)
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
    idft score select scores --keep "$keep" --sft-data data/corpus.jsonl --output fitting.jsonl | sed 's/^/        /'
fi
for source in own foreign broken; do
    printf '        %-8s %5d scored, %5d kept\n' "$source" "$(grep -c "\"source\": \"$source\"" data/corpus.jsonl)" \
        "$(grep -c "\"source\": \"$source\"" fitting.jsonl || true)"
done

if [ "$tune_steps" -eq 0 ]; then exit; fi

say "5. fine-tuning with IDFT on the selection and on everything, side by side"
tune=("${training[@]}" --hf-model model --sft-loss idft --seq-length 96 --train-iters "$tune_steps"
    --global-batch-size 32 --lr 3e-4 --log-interval "$tune_steps" --save-hf final)
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

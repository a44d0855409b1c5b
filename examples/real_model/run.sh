#!/usr/bin/env bash
# A pretrained model on real problems, on a CPU: score, realign, train with IDFT, export, and ask the tuned model.
#   bash examples/real_model/run.sh [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; --fresh starts over. PYTHON names the interpreter.
# SCORED, REALIGNED (numbers of records), OWN_SAMPLES, STEPS (of the training) and MAX_NEW_TOKENS change the sizes;
# MODEL=FOLDER takes another Hugging Face folder.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$checkout/.quickstart" "$@"
scored=${SCORED:-24} realigned=${REALIGNED:-4} own_samples=${OWN_SAMPLES:-20} steps=${STEPS:-8}
max_new_tokens=${MAX_NEW_TOKENS:-160} model=${MODEL:-$checkout/.cache/real_model/SmolLM2-135M-Instruct}
enter_folder "$scored $realigned $own_samples $steps $max_new_tokens $model"

# stage NAME LINE: says what begins, and writes down how long it took when the next one begins; what an earlier start
# finished keeps its time.
stage_name='' stage_began=0
stage() {
    if [ -n "$stage_name" ] && ! grep -q "^$stage_name	" stages.tsv 2>/dev/null; then
        printf '%s\t%d\n' "$stage_name" $((SECONDS - stage_began)) >>stages.tsv
    fi
    stage_name=$1 stage_began=$SECONDS
    if [ -n "$2" ]; then say "$2"; fi
}

stage model "1. a pretrained model and grade-school problems: $model"
if [ -z "${MODEL:-}" ]; then
    logged model.log 's/^(downloading|converting) .*/        &/p' "$python" "$here/fetch.py"
fi
if [ ! -e problems/origin.json ]; then
    logged problems.log 's/^/        /p' "$python" "$here/problems.py" problems --train 64 --validation 8 --held-out 16
fi

# Two launches' worth of processes: each takes chunks of records, and then one of the temperatures of own samples.
stage score "2. score: how far $scored worked solutions lie from the model, and its own answers as the measure"
if [ ! -e scores/report.html ]; then
    launch 2 -m megatron_idft score --cpu --hf-model "$model" --sft-data problems/train.jsonl --limit "$scored" \
        --chunk-records 6 --seq-length 512 --output scores --calibrate "$own_samples" --calibrate-max-tokens 64
    idft score report scores --title "Worked solutions under ${model##*/}" | sed 's/^/        /'
fi

# Which hint a model follows, it shows itself: the packaged ones are tried on two records first.
stage realign "3. realign: $realigned of the solutions again, in the model's own words where the answer stays right"
if [ ! -e realigned/report.html ]; then
    launch 2 -m megatron_idft realign --cpu --hf-model "$model" --sft-data problems/train.jsonl --limit "$realigned" \
        --chunk-records 2 --seq-length 1024 --output realigned --prompt-trial-records 2 --analysis-max-tokens 80 \
        --max-new-tokens "$max_new_tokens" --seed 1
    idft realign report realigned --title "Worked solutions, realigned" | sed 's/^/        /'
fi

# Three tensor-parallel processes: the model's 9 heads and 3 groups of keys and values are divisible by 3, not by 2.
stage train "4. train: $steps steps with --sft-loss idft from the Hugging Face folder, cut into 3 tensor-parallel parts"
train 3 tuned --hf-model "$model" --tensor-model-parallel-size 3 --sft-loss idft --sft-packing --seq-length 512 \
    --sft-data problems/train.jsonl --sft-valid-data problems/validation.jsonl --train-iters "$steps" \
    --micro-batch-size 1 --global-batch-size 2 --lr 2e-5 --lr-warmup-iters 1 --log-interval 1 --save-hf final

stage ask "5. ask: a held-out problem for both models, greedily, through transformers"
tuned=$(printf 'tuned/hf/iter_%07d' "$steps")
if [ ! -e answers.json ]; then
    logged answers.log 's/^ {8}.*/&/p' "$python" "$here/ask.py" "base=$model" "tuned=$tuned" \
        --data problems/held-out.jsonl --max-new-tokens "$max_new_tokens" --out answers.json
fi

stage '' ''
"$python" "$here/table.py" . | sed 's/^/        /'
say "done, in $out. Again from the beginning: --fresh. A comparison of losses: bash examples/arithmetic/run.sh"

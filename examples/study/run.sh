#!/usr/bin/env bash
# Does it help? Losses and corpora on a real model: what it learns, what it keeps, at the same distance from the base.
#   bash examples/study/run.sh [--size smoke|cpu|gpu] [--out FOLDER] [--fresh]
# A run that was interrupted goes on where it was when started again; what is in flight when it is killed is done again.
# sizes/SIZE.sh holds all numbers. PYTHON names the interpreter, MODEL=FOLDER takes another Hugging Face folder.
set -euo pipefail

# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
size=cpu
option() {
    if [ "$1" != --size ]; then return 1; fi
    size=${2:?--size needs a name}
    if [ ! -e "$here/sizes/$size.sh" ]; then
        echo "run.sh: --size $size: there is $(cd "$here/sizes" && echo *.sh | sed 's/\.sh//g')" >&2
        exit 2
    fi
}
arguments "" "$@"
device=(--cpu) # flags of all programs
precision=()   # and of trainings and of what measures their models
# shellcheck source=examples/study/sizes/cpu.sh
source "$here/sizes/$size.sh"
out=${out:-$checkout/.cache/study-$size}
model=${MODEL:-$checkout/.cache/real_model/SmolLM2-135M-Instruct}
# More arms, learning rates and seeds may join a folder that was begun; its problems and lengths stay.
enter_folder "${problems[*]} ${steps[*]} $pack_length $answer_tokens $samples $chat_samples ${precision[*]} $model" \
    "$here"/{world,evaluate}.py "$here"/chat_prompts.txt

case " ${arms[*]} " in
    *" dpo "* | *" simpo "*)
        if ! "$python" -c 'import trl, datasets' 2>/dev/null; then
            echo "run.sh: the arms dpo and simpo need TRL: $python -m pip install 'trl>=1.16'" >&2
            exit 1
        fi
        ;;
esac

# queue FUNCTION: calls it with the words of each line, some side by side. After a failure no further one is begun.
queue() {
    local line failed='' running=0
    while read -ra line; do
        if ((running == at_once)); then
            wait -n || failed=yes
            running=$((running - 1))
        fi
        if [ -n "$failed" ]; then break; fi
        "$1" "${line[@]}" </dev/null &
        running=$((running + 1))
    done
    while ((running > 0)); do
        wait -n || failed=yes
        running=$((running - 1))
    done
    if [ -n "$failed" ]; then exit 1; fi
}

say "1. a pretrained model, problems, and another author's solutions: right ones, and some with a wrong step"
if [ -z "${MODEL:-}" ]; then
    logged model.log 's/^(downloading|converting) .*/        &/p' "$python" "$checkout/examples/real_model/fetch.py"
fi
if [ ! -e world/origin.json ] || [ ! -e "world/seed-${seeds[-1]}/noisy.jsonl" ]; then
    logged world.log d "$python" "$here/world.py" world --seeds "${seeds[@]}" "${problems[@]}"
fi

evaluate() { # FOLDER FLAG…
    logged "$1.log" 's/^step /        &/p' "$python" "$here/evaluate.py" "${device[@]}" "${precision[@]}" \
        --output "$1" --sft-data world/problems/*.jsonl --seq-length 512 --answer-tokens "$answer_tokens" \
        --samples "$samples" --chat-samples "$chat_samples" --corpus-records "$corpus_records" \
        --sampled "${sampled[@]}" --seed 1 "${@:2}"
}
base() { if [ ! -e base/0.json ]; then evaluate base --hf-model "$model"; fi; }

# An arm is LOSS or LOSS-CORPUS. Corpora: original, noisy; realigned: by `realign`, in the model's own words; own: the
# model's own right answers to the same problems; distilled: by the hinted stream alone, which sees the answer. The arms
# dpo and simpo, by TRL, learn from pairs of a right and a wrong answer of the model's own.
loss_flags() {
    case $1 in
        sft) echo --sft-loss ce ;;
        idft_ends) echo --sft-loss idft --sft-loss-exempt-tokens end-of-turn ;;
        idft_floor) echo --sft-loss idft --sft-loss-weight-floor 0.1 ;;
        idft_reference) echo --sft-loss idft --idft-weights reference ;;
        *) echo --sft-loss "$1" ;;
    esac
}
corpus_of() { case $1 in *-*) echo "${1#*-}" ;; dpo | simpo) echo own ;; *) echo original ;; esac; }
wanted=$(for arm in "${arms[@]}" "${followers[@]}"; do corpus_of "$arm"; done | sort -u)
realign() { # SEED NAME FLAG…
    local folder=world/seed-$1/$2
    if [ -e "$folder.jsonl" ]; then return; fi
    logged "$folder.log" 's/^> (records: .*)/        \1/p' "$python" -m megatron_idft realign \
        "${device[@]}" --hf-model "$model" --sft-data "world/seed-$1/original.jsonl" --output "$folder" \
        --seq-length 1024 --seed "$1" --max-new-tokens "$answer_tokens" --more-room 0 "${@:3}"
    logged "$folder-merge.log" d idft realign merge "$folder" --output "$folder.jsonl"
}
corpora() { # SEED
    if [ "$1" = base ]; then base; return; fi
    local hinted=(--analysis-max-tokens "$answer_tokens" "${hint_flags[@]}")
    case $wanted in *realigned*) realign "$1" realigned "${hinted[@]}" ;; esac
    case $wanted in *own*) realign "$1" own --regenerate --only-right "${own_flags[@]}" ;; esac
    case $wanted in *distilled*)
        realign "$1" distilled "${hinted[@]}" --rollout-samples 0 --retries 0 --mix fixed --hint-share 1 ;;
    esac
}
say "2. the base model's answers, and samples of its own that measure how far others go from it; realigned corpora"
mkdir -p results packs logs
printf '%s\n' base "${seeds[@]}" | queue corpora

# Of every corpus what the base model says of its tokens: phi before training, and the reference of anchored losses.
pack() { # SEED CORPUS
    local name=seed-$1-$2 data=world/seed-$1/$2.jsonl reference=()
    if [ -e "packs/$name.json" ] || [ "$(wc -l <"$data")" -lt "$fewest" ]; then return; fi
    logged "packs/$name-score.log" d "$python" -m megatron_idft score "${device[@]}" --hf-model "$model" \
        --sft-data "$data" --seq-length "$pack_length" --sft-truncation drop --output "packs/$name-scores" \
        --chunk-records 64
    reference=(--sft-reference "packs/$name-scores" --sft-reference-entropy)
    logged "packs/$name.log" d idft prepare --tokenizer-model "$model" --sft-data "$data" --seq-length "$pack_length" \
        --sft-truncation drop --output "packs/$name" "${reference[@]}"
}
say "3. every corpus under the base model, and its packs"
for corpus in $wanted; do
    for seed in "${seeds[@]}"; do echo "$seed" "$corpus"; done
done | queue pack

# training FOLDER ARM LEARNING_RATE SEED: checkpoints in FOLDER/model.
training() {
    local corpus flags
    corpus=$(corpus_of "$2")
    read -ra flags <<<"$(loss_flags "${2%%-*}")"
    logged "logs/$2@$3@$4.log" d "$python" -m megatron_idft train "${device[@]}" "${precision[@]}" \
        --hf-model "$model" "${flags[@]}" --sft-data "packs/seed-$4-$corpus" --seq-length "$pack_length" \
        --train-iters "${steps[-1]}" --micro-batch-size 1 --global-batch-size "$batch" --lr "$3" \
        --lr-decay-style constant --lr-warmup-iters 1 --clip-grad 1.0 --weight-decay 0.0 --seed "$4" \
        --save "$1/model" --save-interval "${steps[0]}" --no-save-optim --no-save-rng --log-interval 1 \
        --tensorboard-dir "$1/tensorboard"
}
preference() { # the same for dpo and simpo: a Hugging Face folder FOLDER/model/STEP for each step
    logged "logs/$2@$3@$4.log" d "$python" "$here/preference.py" "${device[@]}" "${precision[@]}" --loss "$2" \
        --hf-model "$model" --sft-data "world/seed-$4/original.jsonl" --own "world/seed-$4/own" \
        --output "$1/model" --steps "${steps[@]}" --lr "$3" --pairs "$pairs" --seed "$4"
}

# one ARM LEARNING_RATE SEED: trains and evaluates; the checkpoints go when their numbers are there.
one() {
    local name=$1@$2@$3 corpus began=$SECONDS trained step
    corpus=$(corpus_of "$1")
    if [ -e "results/$name.json" ]; then return; fi
    if [ ! -e "packs/seed-$3-$corpus.json" ]; then
        echo "        $name: left out, $corpus has $(wc -l <"world/seed-$3/$corpus.jsonl") records, fewer than $fewest"
        return
    fi
    mkdir -p "work/$name"
    case $1 in dpo | simpo) preference "work/$name" "$@" ;; *) training "work/$name" "$@" ;; esac
    trained=$((SECONDS - began))
    local after=(--base base/0.json --last "${steps[-1]}" --corpus "world/seed-$3/$corpus.jsonl")
    case $1 in
        dpo | simpo)
            for step in "${steps[@]}"; do
                evaluate "work/$name/numbers" --hf-model "work/$name/model/$step" --tokenizer-model "$model" \
                    --steps "$step" "${after[@]}" >/dev/null
            done
            ;;
        *)
            evaluate "work/$name/numbers" --hf-model "$model" --trained "work/$name/model" --steps "${steps[@]}" \
                "${after[@]}" >/dev/null
            ;;
    esac
    "$python" "$here/collect.py" "work/$name" "results/$name.json" --scores "packs/seed-$3-$corpus-scores" \
        --training-seconds $trained
    rm -rf "work/$name"
    say "   $name: $trained s of training, $((SECONDS - began)) s in all"
}
rm -rf work # of a run that was killed: its arms in flight
mkdir work

first=${seeds[0]}
say "4. seed $first: every arm with the learning rates ${rates[*]}; further ones where the best lies at an edge"
for rate in "${rates[@]}"; do
    for arm in "${arms[@]}"; do echo "$arm" "$rate" "$first"; done
done >runs.txt
queue one <runs.txt
choose() { "$python" "$here/choose.py" results --seed "$first" --arms "${arms[@]}" --followers "${followers[@]}" "$@"; }
for ((i = 0; i < extensions; i++)); do
    choose --edges >runs.txt
    queue one <runs.txt
done

say "5. the learning rate of each arm by the selection problems, and that at which sft stays as near as idft"
choose --out choice.json | tee choice.txt | sed 's/^/        /'
say "6. the other seeds"
for seed in "${seeds[@]}"; do sed "s/$/ $seed/" choice.txt; done >runs.txt
queue one <runs.txt

# Of the trained tokens, by kinds: what the base model says of each corpus, and a trained model of the one it has seen.
explain() { # ARM LEARNING_RATE
    local work=work/where-$1 scored
    if [ -e "where/$1.json" ]; then return; fi
    mkdir -p "$work"
    training "$work" "$1" "$2" "$first"
    scored=$work/scores
    logged "logs/where-$1-score.log" d "$python" -m megatron_idft score "${device[@]}" "${precision[@]}" \
        --hf-model "$model" --load "$work/model" --sft-data "world/seed-$first/original.jsonl" \
        --seq-length "$pack_length" --sft-truncation drop --output "$scored"
    logged "logs/where-$1-packs.log" d idft prepare --tokenizer-model "$model" --seq-length "$pack_length" \
        --sft-data "world/seed-$first/original.jsonl" --sft-truncation drop --output "$work/packs" \
        --sft-reference "$scored" --sft-reference-entropy
    "$python" "$here/where.py" "where/$1.json" "original, after $1=$work/packs" --tokenizer-model "$model"
    rm -rf "$work"
}
say "7. where the losses put their weight, before training and after"
mkdir -p where
for corpus in $wanted; do
    if [ -e "packs/seed-$first-$corpus.json" ]; then echo "$corpus, before=packs/seed-$first-$corpus"; fi
done >packs.txt
mapfile -t packs <packs.txt
"$python" "$here/where.py" where/base.json "${packs[@]}" --tokenizer-model "$model"
for arm in "${explained[@]}"; do
    grep -m 1 "^$arm " choice.txt || echo "        $arm: no learning rate was chosen, so it is not explained" >&2
done | queue explain

say "8. the report"
"$python" "$here/report/make.py" . --size "$size" | sed 's/^/        /'
say "done, in $out; again from the beginning: --fresh"

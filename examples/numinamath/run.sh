#!/usr/bin/env bash
# The paper's recipe on one node of 8 GPUs: Qwen2.5-7B, fine-tuned with IDFT on 100,000 records of NuminaMath-CoT, from
# the download to a Hugging Face folder, with the corpus scored before and after.
#
#   OUT=/shared/numinamath bash examples/numinamath/run.sh [--dry-run]
#
# --dry-run prints the commands of all stages. What is finished is not done again, and an interrupted training goes on.
# SFT_LOSS=ce (or dft) trains the same with another loss into a folder of its own. The Hugging Face token, if the model
# asks for one, comes from HF_TOKEN; 600 GB of disk are needed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../../launch/common.sh"
options "$@"

OUT=${OUT:-$PWD/numinamath}
SFT_LOSS=${SFT_LOSS:-idft}
RECORDS=${RECORDS:-100000}
model=$OUT/Qwen2.5-7B
save=$OUT/$SFT_LOSS
find_interpreter
export PYTHON

say() { printf '\n# %s\n' "$*"; }
run() { if [ -n "$dry_run" ]; then print_command "$@"; else "$@"; fi; }
idft() { run "$PYTHON" -m megatron_idft "$@"; }

say "1. the model, 15 GB, and the corpus, 1 GB"
if [ ! -e "$model/done" ]; then
    # A model that could not be trained is refused by its smallest file, before the rest is fetched.
    run hf download Qwen/Qwen2.5-7B config.json --local-dir "$model"
    idft convert check "$model" --config-only --tensor-model-parallel-size 2 --seq-length 3888
    run hf download Qwen/Qwen2.5-7B --local-dir "$model"
    run touch "$model/done"
fi
idft convert check "$model" --tensor-model-parallel-size 2 --seq-length 3888
if [ ! -e "$OUT/raw/done" ]; then
    run hf download AI-MO/NuminaMath-CoT --repo-type dataset --local-dir "$OUT/raw"
    run touch "$OUT/raw/done"
fi

say "2. records: $RECORDS to train on, 256 held out"
if [ ! -e "$OUT/train.jsonl" ]; then
    run "$PYTHON" "$here/records.py" "$OUT/raw" "$OUT" --records "$RECORDS"
fi

# For the eye, and for counting: what is trained in each record, how long records are, how many are cut.
say "3. tokenized and packed once, on the processors"
if [ ! -e "$OUT/packs/train.json" ]; then
    run bash "$launch_dir/offline.sh" prepare --sft-data "$OUT/train.jsonl" --output "$OUT/packs/train" \
        --tokenizer-model "$model" --seq-length 3888 --show 2
fi

# Batches of 256 records, as in the paper, one to a row: 390 steps. PACKED=yes trains on the packs instead, whose rows
# are full, with as many of them in a batch as make 390 steps too.
data=$OUT/train.jsonl valid=$OUT/valid.jsonl batch=256
if [ "${PACKED:-no}" = yes ]; then
    data=$OUT/packs/train valid='' save+=-packed
    if [ -e "$data.json" ]; then
        batch=$("$PYTHON" -c 'import sys; from megatron_idft.data.packed.store import PackedStore
print(max(4, round(len(PackedStore(sys.argv[1])) / 390 / 4) * 4))' "$data")
    fi
fi

say "4. the plan of the training, and the training: 8 GPUs, TP 2"
settings=(
    HF_MODEL="$model" MODEL=qwen2.5-7b GPUS_PER_NODE=8 NNODES=1
    DATA="$data" VALID_DATA="$valid" SAVE="$save" SFT_LOSS="$SFT_LOSS"
    EPOCHS=1 SEQ_LENGTH=3888 GLOBAL_BATCH="$batch" LR=6e-5 MIN_LR=0 SAVE_INTERVAL=130
)
env "${settings[@]}" CHECK_INPUTS="${dry_run:+no}" bash "$launch_dir/train.sh" --dry-run
if [ -z "$dry_run" ]; then env "${settings[@]}" bash "$launch_dir/train.sh"; fi

say "5. held-out records under the model before and after: the distance from its own distribution"
tuned=$save/hf/iter_0000390
if [ -d "$save/hf" ]; then tuned=$(find "$save/hf" -maxdepth 1 -name 'iter_*' | sort | tail -n 1); fi
for name in base "$SFT_LOSS"; do
    folder=$model
    if [ "$name" != base ]; then folder=$tuned; fi
    if [ ! -e "$OUT/scores-$name/scores.parquet" ]; then
        run bash "$launch_dir/offline.sh" score --hf-model "$folder" --tensor-model-parallel-size 2 \
            --sft-data "$OUT/valid.jsonl" --seq-length 3888 --output "$OUT/scores-$name" --calibrate 200
    fi
done
idft score report "$OUT/scores-base" "$OUT/scores-$SFT_LOSS" --output "$OUT/compared-$SFT_LOSS" \
    --title "Before and after"
say "done: the model for transformers, vLLM and benchmarks is $tuned"

#!/usr/bin/env bash
# One launch of an offline tool on this machine: score and realign on its GPUs, prepare on its processors.
#
#   bash launch/offline.sh score   --hf-model /models/m --sft-data corpus.jsonl --seq-length 4096 --output /shared/scores
#   bash launch/offline.sh realign --hf-model /models/m --sft-data corpus.jsonl --seq-length 12288 --output /shared/new
#   bash launch/offline.sh prepare --sft-data corpus.jsonl --output /shared/packs/train --tokenizer-model … --seq-length N
#
# Start it as often and on as many machines as you like: score and realign share their --output folder, each launch
# takes what is left. Stopped or killed, the same command goes on. --dry-run prints the plan and starts nothing; flags
# after -- go to the tool even if they are called --dry-run or --help. DEVICE=cpu and GPUS_PER_NODE (8) say what there
# is. Ends with 143 when SIGTERM stopped it, with 130 when Ctrl-C did.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"

DEVICE=${DEVICE:-gpu}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

verb=${flags[0]:-}
flags=("${flags[@]:1}")
set_environment
find_interpreter
case ${flags[0]:-} in --*) check_inputs "${flags[@]}" ;; esac
case $verb in
    score | realign)
        if [ "$DEVICE" = gpu ]; then flags+=(--bf16); else flags+=(--cpu); fi
        plan "a launch of its own on $GPUS_PER_NODE processes ($DEVICE); all launches on one --output share the work"
        start "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS_PER_NODE" \
            -m megatron_idft "$verb" "${flags[@]}"
        ;;
    prepare)
        plan "one launch, with a process for each processor unless --workers says otherwise"
        start "$PYTHON" -m megatron_idft prepare "${flags[@]}"
        ;;
    *) fail "what to run? score, realign or prepare, then its flags; --help shows examples" ;;
esac

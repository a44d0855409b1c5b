#!/usr/bin/env bash
# Fine-tune a model: on one node, or as one node of many. Run the same command on every node, and again to continue.
#
#   HF_MODEL=/models/Qwen2.5-7B MODEL=qwen2.5-7b DATA=train.jsonl SAVE=/checkpoints/run bash launch/train.sh
#   NNODES=2 MASTER_ADDR=node0 … bash launch/train.sh      on node0 and on the other node
#
# --dry-run prints the plan and starts nothing; all other flags go to `megatron-idft train`, after those below, and win.
# The settings at the top of the script are variables of the environment; ENVIRONMENT.md has a page of the others.
# Ends with 0 when training is finished, also before this start; with 143 when SIGTERM stopped it (Ctrl-C: 130) and a
# checkpoint holds all that was trained; with another code when something is lost or wrong, which the last line says.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"

# ---- what is trained. SAVE must be on a disk that all nodes share: it is where a restart goes on.
HF_MODEL=${HF_MODEL:-}     # a Hugging Face folder; or PRETRAINED, a checkpoint of `convert to-megatron`
PRETRAINED=${PRETRAINED:-} # its conversion.json names the model's flags; its tokenizer is TOKENIZER, or lies beside it
DATA=${DATA:-}             # records or packs, several with spaces between them
VALID_DATA=${VALID_DATA:-}
SAVE=${SAVE:-}
SFT_LOSS=${SFT_LOSS:-idft} # a name in docs/loss.md, or module:function

# ---- where. MODEL, a name of layouts.txt, gives the layout for NNODES x GPUS_PER_NODE; or set TP, PP, CP, EP.
DEVICE=${DEVICE:-gpu} # gpu or cpu
GPUS_PER_NODE=${GPUS_PER_NODE:-${PET_NPROC_PER_NODE:-8}}
NNODES=${NNODES:-${PET_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${PET_NODE_RANK:-}}} # node 0 hosts the rendezvous; without: the host MASTER_ADDR
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
RDZV_ID=${RDZV_ID:-idft}
MAX_RESTARTS=${MAX_RESTARTS:-3}       # of the processes by torchrun, from the last checkpoint
JOIN_SECONDS=${JOIN_SECONDS:-900}     # that nodes wait for each other
TIMEOUT_MINUTES=${TIMEOUT_MINUTES:-30} # of a collective

# ---- how
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MICRO_BATCH=${MICRO_BATCH:-1}
GLOBAL_BATCH=${GLOBAL_BATCH:-256}
EPOCHS=${EPOCHS:-1} # or ITERS
ITERS=${ITERS:-}
LR=${LR:-1e-5}
MIN_LR=${MIN_LR:-0}
SEED=${SEED:-1234}
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
EVAL_INTERVAL=${EVAL_INTERVAL:-} # without: before and after training
SAVE_HF=${SAVE_HF:-final}        # also write SAVE/hf/iter_N for transformers: final, every or no
LOG_INTERVAL=${LOG_INTERVAL:-1}

need DATA "the training records, JSONL or Parquet, or the packs of prepare"
need SAVE "the folder for checkpoints, on a disk that all nodes share"
if [ -z "$HF_MODEL$PRETRAINED" ]; then
    fail "no model: set HF_MODEL to a Hugging Face folder, or PRETRAINED to a checkpoint of convert to-megatron"
fi
case $DEVICE in gpu | cpu) ;; *) fail "DEVICE=$DEVICE: gpu or cpu" ;; esac
if [ "$NNODES" -gt 1 ]; then need MASTER_ADDR "the host name of the first node, the same on every node"; fi

set_environment
find_interpreter
use_layout $((NNODES * GPUS_PER_NODE))
if [ $((GLOBAL_BATCH % (MICRO_BATCH * DP))) -ne 0 ]; then
    fail "GLOBAL_BATCH $GLOBAL_BATCH is no multiple of MICRO_BATCH $MICRO_BATCH x DP $DP: take $((MICRO_BATCH * DP *
        (GLOBAL_BATCH / (MICRO_BATCH * DP) + 1)))"
fi

if [ "$NNODES" -eq 1 ]; then
    DISTRIBUTED_ARGS=(--standalone)
else
    DISTRIBUTED_ARGS=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$RDZV_ID")
    DISTRIBUTED_ARGS+=(--rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
    conf=join_timeout=$JOIN_SECONDS
    if [ -n "$NODE_RANK" ]; then conf+=,is_host=$([ "$NODE_RANK" -eq 0 ] && echo true || echo false); fi
    DISTRIBUTED_ARGS+=(--rdzv-conf "$conf")
fi
DISTRIBUTED_ARGS+=(--nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")

# The weights to begin with are --hf-model or --pretrained-checkpoint, never --load: that is SAVE, so that the same
# command, started again, goes on from the last checkpoint there.
if [ -n "$HF_MODEL" ]; then
    MODEL_ARGS=(--hf-model "$HF_MODEL") # brings the flags of the model, its tokenizer and template
else
    MODEL_ARGS=(--pretrained-checkpoint "$PRETRAINED" --tokenizer-model "${TOKENIZER:-$PRETRAINED/tokenizer}")
    case " ${flags[*]} " in
        *" --num-layers"[\ =]* | *" --hybrid-layer-pattern"[\ =]* | *" --use-checkpoint-args "*) ;; # the flags of the model came with the command
        *) converted_model_flags "$PRETRAINED" ;;
    esac
fi

TRAINING_ARGS=(
    --sft-loss "$SFT_LOSS"
    --seq-length "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$GLOBAL_BATCH"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.01
    --clip-grad 1.0
    --seed "$SEED"
    --distributed-timeout-minutes "$TIMEOUT_MINUTES"
)
if [ -n "$ITERS" ]; then TRAINING_ARGS+=(--train-iters "$ITERS"); else TRAINING_ARGS+=(--train-epochs "$EPOCHS"); fi
if [ "$DEVICE" = gpu ]; then
    TRAINING_ARGS+=(--bf16 --transformer-impl transformer_engine)
    MODEL_PARALLEL_ARGS+=(--overlap-grad-reduce --overlap-param-gather "${GPU_ARGS[@]}")
else
    TRAINING_ARGS+=(--cpu)
fi

read -ra data <<<"$DATA"
DATA_ARGS=(--sft-data "${data[@]}")
read -ra valid_data <<<"$VALID_DATA"
if [ ${#valid_data[@]} -gt 0 ]; then DATA_ARGS+=(--sft-valid-data "${valid_data[@]}"); fi

EVAL_AND_LOGGING_ARGS=(
    --save "$SAVE"
    --load "$SAVE"
    --save-interval "$SAVE_INTERVAL"
    --log-interval "$LOG_INTERVAL"
    --tensorboard-dir "$SAVE/tensorboard"
)
if [ -n "$EVAL_INTERVAL" ]; then EVAL_AND_LOGGING_ARGS+=(--eval-interval "$EVAL_INTERVAL"); fi
if [ "$SAVE_HF" != no ]; then EVAL_AND_LOGGING_ARGS+=(--save-hf "$SAVE_HF"); fi
if [ -n "${WANDB_PROJECT:-}" ]; then # the key comes from WANDB_API_KEY or `wandb login`
    one_wandb_run "$SAVE"
    EVAL_AND_LOGGING_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_NAME:-$(basename "$SAVE")}")
fi

check_inputs "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" --seq-length "$SEQ_LENGTH" "${DATA_ARGS[@]}" "${flags[@]}"
micro_batches=$((GLOBAL_BATCH / (MICRO_BATCH * DP)))
plan "nodes    $NNODES, this is node ${NODE_RANK:-${MASTER_ADDR:-0}}" \
    "GPUs     $((NNODES * GPUS_PER_NODE)), $GPUS_PER_NODE on each node ($DEVICE)" \
    "layout   TP $TP, PP $PP, CP $CP, EP $EP, DP $DP, recompute $RECOMPUTE" \
    "batch    $GLOBAL_BATCH sequences of $SEQ_LENGTH = $MICRO_BATCH x DP $DP x $micro_batches micro-batches" \
    "begins   with ${HF_MODEL:-$PRETRAINED}; where $SAVE has a checkpoint, goes on from there" \
    "memory   megatron-idft plan --gpus $((NNODES * GPUS_PER_NODE)) --gpus-per-node $GPUS_PER_NODE counts it, given" \
    "         also the flags after \`train\` below"
start_training "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}" -m megatron_idft train \
    "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" "${flags[@]}"

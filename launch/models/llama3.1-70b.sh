# shellcheck shell=bash disable=SC2034
# Llama 3.1 70B (meta-llama/Llama-3.1-70B and -Instruct), Llama 3.3 70B
# Flags of its config.json; needed only where --hf-model does not bring them.
MODEL_ARGS=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
    --kv-channels 128
    --group-query-attention
    --num-query-groups 8
    --position-embedding-type rope
    --rotary-base 500000
    --use-rope-scaling
    --rope-scaling-factor 8.0
    --max-position-embeddings 131072
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --padded-vocab-size 128256
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

# layout GPUS: for GPUs of 80 GB and sequences of 4096 tokens.
layout() {
    case $1 in
        32 | 64 | 128 | 256 | 512 | 1024) TP=8 PP=4 ;;
        *) return 1 ;;
    esac
}

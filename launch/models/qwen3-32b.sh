# shellcheck shell=bash disable=SC2034
# Qwen3 32B (Qwen/Qwen3-32B)
# Flags of its config.json; needed only where --hf-model does not bring them.
MODEL_ARGS=(
    --num-layers 64
    --hidden-size 5120
    --ffn-hidden-size 25600
    --num-attention-heads 64
    --kv-channels 128
    --group-query-attention
    --num-query-groups 8
    --position-embedding-type rope
    --rotary-base 1000000
    --max-position-embeddings 40960
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --swiglu
    --disable-bias-linear
    --qk-layernorm
    --untie-embeddings-and-output-weights
    --padded-vocab-size 151936
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

# layout GPUS: for GPUs of 80 GB and sequences of 4096 tokens.
layout() {
    case $1 in
        16 | 32 | 64 | 128 | 256 | 512) TP=8 ;;
        *) return 1 ;;
    esac
}

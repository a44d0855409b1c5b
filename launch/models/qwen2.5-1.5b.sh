# shellcheck shell=bash disable=SC2034
# Qwen2.5 1.5B (Qwen/Qwen2.5-1.5B). Instruct has --max-position-embeddings 32768
# Flags of its config.json; needed only where --hf-model does not bring them.
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 1536
    --ffn-hidden-size 8960
    --num-attention-heads 12
    --kv-channels 128
    --group-query-attention
    --num-query-groups 2
    --position-embedding-type rope
    --rotary-base 1000000
    --max-position-embeddings 131072
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --padded-vocab-size 151936
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

# layout GPUS: for GPUs of 80 GB and sequences of 4096 tokens.
layout() {
    case $1 in
        1 | 2 | 4 | 8 | 16 | 32 | 64 | 128 | 256 | 512) TP=1 ;;
        *) return 1 ;;
    esac
}

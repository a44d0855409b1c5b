# shellcheck shell=bash disable=SC2034
# Qwen3 30B-A3B, a mixture of 128 experts (Qwen/Qwen3-30B-A3B). Base has --max-position-embeddings 32768
# Flags of its config.json; needed only where --hf-model does not bring them.
MODEL_ARGS=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --kv-channels 128
    --group-query-attention
    --num-query-groups 4
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
    --num-experts 128
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)
# Kernels of Transformer Engine; train.sh leaves them out on a CPU.
MOE_ARGS=(--moe-grouped-gemm --moe-token-dispatcher-type alltoall)

# layout GPUS: for GPUs of 80 GB and sequences of 4096 tokens.
layout() {
    case $1 in
        16 | 32) TP=1 EP=8 RECOMPUTE=full ;; # 16 would just fit without, if routing were even
        64 | 128 | 256 | 512) TP=1 EP=8 ;;
        *) return 1 ;;
    esac
}

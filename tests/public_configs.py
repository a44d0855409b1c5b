"""What public config.json files say: `CONFIGS`, the models of launch/layouts.txt; `PUBLIC`, well-known folders."""

from dataclasses import dataclass
from typing import Any


def _llama(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    } | more


_LLAMA31: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def _qwen(hidden: int, ffn: int, layers: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 131072,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    } | more


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    own = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_scaling": None,
        "sliding_window": None,
        "vocab_size": 151936,
    }
    return _qwen(hidden, ffn, layers, heads, 8) | own | more


CONFIGS: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama(4096, 14336, 32, 32),
    "llama3-70b": _llama(8192, 28672, 80, 64),
    "llama3.1-8b": _llama(4096, 14336, 32, 32, **_LLAMA31),
    "llama3.1-70b": _llama(8192, 28672, 80, 64, **_LLAMA31),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, tie_word_embeddings=True, vocab_size=151936),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4),
    "qwen2.5-72b": _qwen(8192, 29568, 80, 64, 8, rms_norm_eps=1e-05),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(
        2048,
        6144,
        48,
        32,
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        num_key_value_heads=4,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    ),
}


@dataclass(frozen=True)
class Public:
    """What config.json of a public folder says, and what becomes of it.

    Attributes:
        config: the fields.
        ignored: those that are named as ignored.
        refused: what the refusal says, field by field; none if it converts.
        ignore: the fields that `--ignore-config` may ignore, with which it converts.
    """

    config: dict[str, Any]
    ignored: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


def _saved(version: str, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    return {"torch_dtype": dtype, "transformers_version": version, "use_cache": True} | more


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _llama2(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    own = {"max_position_embeddings": 4096, "num_key_value_heads": heads, "vocab_size": 32000}
    own |= {"bos_token_id": 1, "eos_token_id": 2} | _saved("4.31.0", "float16")
    config = _llama(hidden, ffn, layers, heads, **own)
    return _without(config, "attention_bias", "attention_dropout", "rope_theta") | more


def _mistral(**more: Any) -> dict[str, Any]:
    own = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768}
    own |= {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
    config = _llama(4096, 14336, 32, 32, **own, **_saved("4.34.0.dev0"))
    return _without(config, "attention_bias", "attention_dropout", "pretraining_tp", "rope_scaling") | more


def _llama3(size: str, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    return CONFIGS[size] | ids | {"mlp_bias": False} | _saved("4.42.3") | more


_LLAMA32 = _LLAMA31["rope_scaling"] | {"factor": 32.0}
_BNB = {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"}
_GPTQ = {"bits": 4, "desc_act": False, "group_size": 128, "quant_method": "gptq", "sym": True}
_AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_SMOLLM2 = _llama(
    576, 1536, 30, 9, num_key_value_heads=3, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152
)
_SMOLLM2 |= {"is_llama_config": True, "rope_interleaved": False, "bos_token_id": 1, "eos_token_id": 2} | _saved(
    "4.47.1"
)
_BROWSER = {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
_QWEN25 = {"max_position_embeddings": 32768, "sliding_window": 131072, "bos_token_id": 151643, "eos_token_id": 151645}
_QWEN25_7B = CONFIGS["qwen2.5-7b"] | _QWEN25 | _saved("4.43.1")
_R1_QWEN = {
    "use_mrope": False,
    "sliding_window": 4096,
    "max_window_layers": 21,
    "rope_theta": 10000,
    "vocab_size": 151936,
}
_NEMO = {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "rope_theta": 1000000.0, "vocab_size": 131072}
_WINDOW = ("sliding_window is 4096, only null is served", "--ignore-config sliding_window")

PUBLIC = {
    # ---- Llama
    "Llama 2 7B": Public(_llama2(4096, 11008, 32, 32, _name_or_path="meta-llama/Llama-2-7b-hf", pad_token_id=0)),
    "Llama 2 13B, first upload": Public(_llama2(5120, 13824, 40, 40, pretraining_tp=2)),
    "Llama 2 7B Chat, a later save": Public(
        _llama2(4096, 11008, 32, 32, max_length=4096, temperature=0.6, top_p=0.9, do_sample=True),
        ignored=("do_sample", "max_length", "temperature", "top_p"),
    ),
    "CodeLlama 7B": Public(
        _llama2(4096, 11008, 32, 32, rope_theta=1000000, max_position_embeddings=16384, vocab_size=32016)
    ),
    "Vicuna 7B v1.5 16k": Public(
        _llama2(4096, 11008, 32, 32, max_sequence_length=16384, rope_scaling={"factor": 4.0, "type": "linear"}),
        refused=("rope type 'linear' is not served",),
    ),
    "Llama 3 8B": Public(CONFIGS["llama3-8b"] | _saved("4.40.0.dev0", bos_token_id=128000, eos_token_id=128001)),
    "Llama 3.1 8B Instruct": Public(_llama3("llama3.1-8b")),
    "Llama 3.2 1B": Public(
        _llama(2048, 8192, 16, 32, **_LLAMA31 | {"rope_scaling": _LLAMA32}, head_dim=64, tie_word_embeddings=True)
    ),
    "Llama 3.2 3B, saved by transformers 5": Public(
        _without(_llama(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True), "rope_scaling", "rope_theta")
        | {"dtype": "bfloat16", "rope_parameters": {**_LLAMA32, "rope_theta": 500000.0}}
    ),
    "Llama 3.3 70B Instruct": Public(_llama3("llama3.1-70b", head_dim=128, _attn_implementation_autoset=True)),
    "Hermes 3 Llama 3.1 8B": Public(_llama3("llama3.1-8b", eos_token_id=128040, _name_or_path="hermes-3")),
    "Tulu 3 8B": Public(_llama3("llama3.1-8b", vocab_size=128264, pad_token_id=128256, use_cache=False)),
    "R1 Distill Llama 8B": Public(_llama3("llama3.1-8b", head_dim=128, eos_token_id=128001)),
    "TinyLlama 1.1B Chat": Public(
        _llama2(2048, 5632, 22, 32, num_key_value_heads=4, max_position_embeddings=2048, attention_bias=False)
        | {"rope_theta": 10000.0}
    ),
    "SmolLM2 135M": Public(_SMOLLM2),
    "SmolLM2 135M Instruct": Public(_SMOLLM2 | _BROWSER | {"pad_token_id": 2}, ignored=("transformers.js_config",)),
    "SmolLM2 135M Instruct of the package index": Public(
        _without(_SMOLLM2, "is_llama_config", "rope_interleaved", "rope_scaling", "rope_theta", "torch_dtype")
        | {"_model_name_or_path": "Smollm2 135M 8k", "dtype": "float32", "head_dim": 64, "unk_token_id": 0}
        | {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    ),
    "Yi 6B": Public(_llama2(4096, 11008, 32, 32, num_key_value_heads=4, rope_theta=5000000.0, vocab_size=64000)),
    "SOLAR 10.7B": Public(_llama2(4096, 14336, 48, 32, num_key_value_heads=8)),
    "DeepSeek LLM 7B": Public(_llama2(4096, 11008, 30, 32, rms_norm_eps=1e-06, vocab_size=102400)),
    "DeepSeek Coder 6.7B": Public(
        _llama2(4096, 11008, 32, 32, rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"}),
        refused=("rope type 'linear' is not served",),
    ),
    "CLEX 7B": Public(
        _llama2(4096, 11008, 32, 32, log_scale=False, use_flashattn=True)
        | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
        refused=("auto_map is {", "code of its own"),
        ignore=("auto_map",),
    ),
    # ---- Mistral
    "Mistral 7B v0.1": Public(_mistral(), refused=_WINDOW, ignore=("sliding_window",)),
    "Mistral 7B Instruct v0.2": Public(_mistral(sliding_window=None, rope_theta=1000000.0, attention_dropout=0.0)),
    "Mistral 7B v0.3": Public(_mistral(sliding_window=None, rope_theta=1000000.0, vocab_size=32768)),
    "Mistral Nemo": Public(_mistral(sliding_window=None, **_NEMO | {"max_position_embeddings": 131072})),
    "Mistral Small 24B": Public(
        _mistral(sliding_window=None, **_NEMO | {"intermediate_size": 32768, "rope_theta": 100000000.0})
    ),
    "Ministral 8B": Public(
        _mistral(sliding_window=32768, head_dim=128, intermediate_size=12288, num_hidden_layers=36),
        refused=("sliding_window is 32768",),
        ignore=("sliding_window",),
    ),
    "Zephyr 7B": Public(_mistral(pad_token_id=2), refused=_WINDOW, ignore=("sliding_window",)),
    "OpenHermes 2.5": Public(
        _mistral(eos_token_id=32000, use_cache=False, vocab_size=32002), refused=_WINDOW, ignore=("sliding_window",)
    ),
    # ---- Qwen
    "Qwen2 0.5B": Public(
        _qwen(
            896, 4864, 24, 14, 2, sliding_window=131072, tie_word_embeddings=True, vocab_size=151936, **_saved("4.40")
        )
    ),
    "Qwen2.5 7B": Public(_QWEN25_7B | {"use_mrope": False, "max_position_embeddings": 131072}),
    "Qwen2.5 7B Instruct": Public(_QWEN25_7B),
    "Qwen2.5 Math 7B": Public(_QWEN25_7B | {"use_mrope": False, "sliding_window": 4096, "rope_theta": 10000.0}),
    "Qwen2.5 7B Instruct 1M": Public(
        _QWEN25_7B | {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        refused=("dual_chunk_attention_config ({", "--ignore-config dual_chunk_attention_config"),
        ignore=("dual_chunk_attention_config",),
    ),
    "Qwen2.5 7B Instruct, long by YaRN": Public(
        _QWEN25_7B | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        refused=("rope type 'yarn' is not served",),
    ),
    "Qwen2.5 1.5B, saved by transformers 5": Public(
        _without(CONFIGS["qwen2.5-1.5b"], "rope_theta")
        | {"dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "pad_token_id": None}
        | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None}
    ),
    "QwQ 32B": Public(_qwen(5120, 27648, 64, 40, 8, sliding_window=32768, rms_norm_eps=1e-05, **_saved("4.43.1"))),
    "R1 Distill Qwen 1.5B": Public(CONFIGS["qwen2.5-1.5b"] | _R1_QWEN | {"tie_word_embeddings": False}),
    "Qwen3 8B": Public(CONFIGS["qwen3-8b"] | _saved("4.51.0", bos_token_id=151643, eos_token_id=151645)),
    "Qwen3 30B A3B": Public(CONFIGS["qwen3-30b-a3b"] | _saved("4.51.0", bos_token_id=151643)),
    "Qwen3 Coder 30B A3B": Public(
        CONFIGS["qwen3-30b-a3b"]
        | {"max_position_embeddings": 262144, "rope_theta": 10000000, "qkv_bias": False, "use_qk_norm": True}
        | {"shared_expert_intermediate_size": 0}
    ),
    # ---- what tools leave behind
    "Llama 3.2 1B of Unsloth": Public(
        _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, unsloth_fixed=True, pad_token_id=128004),
        ignored=("unsloth_fixed",),
    ),
    "a fine-tune of Qwen2.5 7B by Unsloth": Public(
        _QWEN25_7B | {"unsloth_version": "2025.3.9", "unsloth_fixed": True, "model_name": "unsloth/q"},
        ignored=("unsloth_fixed", "unsloth_version"),
    ),
    "a fine-tune of Llama 3.1 8B by LLaMA-Factory": Public(
        _llama3("llama3.1-8b", group_size_ratio=0.25, quantization_config=None, auto_map=None),
        ignored=("group_size_ratio",),
    ),
    "all attributes of transformers 4": Public(
        _llama2(4096, 11008, 32, 32, return_dict=True, is_decoder=False, add_cross_attention=False, pruned_heads={})
        | {"cross_attention_hidden_size": None, "tie_encoder_decoder": False, "tf_legacy_loss": False, "top_k": 50}
        | {"id2label": {"0": "LABEL_0"}, "suppress_tokens": None, "use_bfloat16": False, "output_scores": False},
        ignored=("output_scores", "suppress_tokens", "top_k"),
    ),
    "Llama 3.1 8B by bitsandbytes": Public(
        _llama3("llama3.1-8b", quantization_config=_BNB, unsloth_fixed=True),
        refused=(
            "quantization_config is {",
            "as it was before it was quantised",
            "--ignore-config quantization_config",
        ),
        ignore=("quantization_config",),
    ),
    "Qwen2.5 7B Instruct GPTQ": Public(_QWEN25_7B | {"quantization_config": _GPTQ}, refused=("before it was quant",)),
    "Mistral 7B Instruct v0.2 AWQ": Public(
        _mistral(sliding_window=None, quantization_config=_AWQ), refused=("before it was quantised",)
    ),
    "Qwen3 8B FP8": Public(CONFIGS["qwen3-8b"] | {"quantization_config": _FP8}, refused=("before it was quantised",)),
    "Llama 3.1 8B of MLX": Public(
        _llama3("llama3.1-8b", quantization={"group_size": 64, "bits": 4}), refused=("quantization is {",)
    ),
}

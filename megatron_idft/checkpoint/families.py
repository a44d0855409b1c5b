"""The model families that are converted: one table each.

A table says which tensors a Hugging Face folder of the family holds, of which shapes, and where each lives in a
Megatron checkpoint; and it accounts for every field of config.json: read, required to have a value that Megatron's
model can take, or known to have no part in the forward pass. A field that no table knows is refused, so nothing is
dropped silently. Adding a family is adding a `Family` here.

The Hugging Face side is stated by `transformers/models/*/{configuration,modeling}_*.py`, the Megatron side by
`megatron/core/models/gpt/gpt_layer_specs.py`, `models/hybrid/hybrid_layer_specs.py` and `transformer/attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Shape = tuple[str, ...]  # of names of dimensions; see `config.ModelShape.dimension`
Scope = Literal["model", "attention", "mlp", "expert"]
# How several Hugging Face tensors make one of Megatron's; see `tensors.py`.
Layout = Literal["copy", "stack", "qkv", "vocabulary"]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        megatron: name within the model, or within a decoder layer if the scope is not "model".
        sources: Hugging Face name -> shape, in the order in which they are joined along the first axis. Within a layer,
            names are relative to `model.layers.N.`; `{expert}` stands for the expert's number.
        scope: "attention" and "mlp" are the two layers that HybridModel makes of a GPTModel layer; "expert" is once per
            expert of an mlp.
        layout: how the sources are joined.
        also: other names under which the same tensor is stored, for the layer specs that look for it there.
    """

    megatron: str
    sources: dict[str, Shape]
    scope: Scope
    layout: Layout = "copy"
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The tensors of a family, and the fields that config.json may have.

    Attributes:
        architecture: the class in transformers; config.json's `architectures` must name it, or nothing.
        rules: the tensors.
        required: field -> the values that are served, with what to do about others. A missing field is as good.
        defaults: field -> what transformers takes for a field that config.json leaves out.
        neutral: fields of this family without a part in the forward pass, or that are covered by another field.
        ignored_tensors: regular expressions of buffers that old checkpoints hold and transformers does not read.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    required: dict[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    ignored_tensors: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------- tensors

EMBEDDING = Rule(
    "embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocab", "hidden")}, "model", "vocabulary"
)
FINAL_NORM = Rule("final_norm", {"model.norm.weight": ("hidden",)}, "model")  # its name depends on the model class
HEAD = Rule("output_layer.weight", {"lm_head.weight": ("vocab", "hidden")}, "model", "vocabulary")  # unless tied

_ATTENTION = (
    # Transformer Engine fuses the norm into the linear layer after it; the local specs use the fused name on disk.
    Rule("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": ("hidden",)}, "attention"),
    Rule(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key", "hidden"),
            "self_attn.v_proj.weight": ("key", "hidden"),
        },
        "attention",
        "qkv",
    ),
    Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "query")}, "attention"),
)
_QKV_BIAS = (
    Rule(
        "self_attention.linear_qkv.bias",
        {
            "self_attn.q_proj.bias": ("query",),
            "self_attn.k_proj.bias": ("key",),
            "self_attn.v_proj.bias": ("key",),
        },
        "attention",
        "qkv",
    ),
)
_QK_NORM = (
    Rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": ("head_dim",)}, "attention"),
    Rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": ("head_dim",)}, "attention"),
)
_MLP = (
    Rule("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": ("hidden",)}, "mlp"),
    Rule(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        "mlp",
        "stack",
    ),
    Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": ("hidden", "ffn")}, "mlp"),
)
_EXPERTS = (
    # The norm before experts is never fused: Transformer Engine's specs and HybridModel's save it under its own name.
    # Only GPTModel's local spec renames it as if it were, as its key map makes no difference between dense and MoE.
    Rule(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": ("hidden",)},
        "mlp",
        also=("mlp.linear_fc1.layer_norm_weight",),
    ),
    Rule("mlp.router.weight", {"mlp.gate.weight": ("experts", "hidden")}, "mlp"),
    Rule(
        "mlp.experts.experts.linear_fc1.weight",
        {
            "mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            "mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        "expert",
        "stack",
    ),
    Rule(
        "mlp.experts.experts.linear_fc2.weight",
        {"mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
        "expert",
    ),
)

# -------------------------------------------------------------------------------------------------------------- config

# Fields that `config.read_model` reads for every family.
READ = frozenset(
    {
        "model_type",
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "initializer_range",
        "attention_dropout",
        "torch_dtype",
        "dtype",
        "layer_types",
    }
)
READ_EXPERTS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
)
# Fields of any config.json that say how to call a model, who saved it or how it was made, and nothing about what it
# computes.
NEUTRAL = frozenset(
    [
        "_name_or_path",
        "name_or_path",
        "_model_name_or_path",
        "model_name",
        "transformers_version",
        "_commit_hash",
        "_diffusers_version",
        "use_cache",
        "tokenizer_class",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "chunk_size_feed_forward",
        "use_bfloat16",
        "_attn_implementation_autoset",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "_flash_attn_2_enabled",
        "_experts_implementation",
        "keys_to_ignore_at_inference",
        "tf_legacy_loss",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "task_specific_params",
        "finetuning_task",
        "prefix",
        "unsloth_fixed",
        "unsloth_version",
        "transformers.js_config",
        "is_llama_config",
        "max_sequence_length",
        "model_max_length",
    ]
) | frozenset(  # of a generation, which transformers 4 kept here too
    [
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    ]
)
_ADVICE_BRIDGE = "Megatron-Bridge may serve it: pip install megatron-bridge, then run the same command"
_OFF = (False, None)
# Megatron's models take these values for granted in all families; with another value they compute something else.
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), _ADVICE_BRIDGE),
    "attention_bias": (_OFF, "biases of the attention's output have no place in the mapping; " + _ADVICE_BRIDGE),
    "mlp_bias": (_OFF, _ADVICE_BRIDGE),
    "pretraining_tp": ((0, 1, None), "set it to 1: it only splits matrix products, the weights are the same"),
    "is_encoder_decoder": (_OFF, _ADVICE_BRIDGE),
    "partial_rotary_factor": ((1, 1.0, None), _ADVICE_BRIDGE),
    "rope_interleaved": (_OFF, _ADVICE_BRIDGE),
    "use_mrope": (_OFF, _ADVICE_BRIDGE),
    "tie_encoder_decoder": (_OFF, _ADVICE_BRIDGE),
    "is_decoder": (_OFF, _ADVICE_BRIDGE),
    "add_cross_attention": (_OFF, _ADVICE_BRIDGE),
    "cross_attention_hidden_size": ((None,), _ADVICE_BRIDGE),
    "pruned_heads": (({}, None), _ADVICE_BRIDGE),
    "quantization_config": ((None,), "take the model as it was before it was quantised"),
    "compression_config": ((None,), "take the model as it was before it was compressed"),
    "auto_map": (({}, None), "the model brings code of its own, which is never run here"),
}
_WINDOW_ADVICE = (
    "Megatron's model would attend to the whole sequence. With --seq-length up to the window both are the same: then"
    " switch the window off in a copy of config.json"
)
_QWEN_WINDOW: dict[str, tuple[tuple[Any, ...], str]] = {"use_sliding_window": (_OFF, _WINDOW_ADVICE)}
# Written out by some versions of Qwen3, whose model has them so.
_QWEN3: dict[str, tuple[tuple[Any, ...], str]] = _QWEN_WINDOW | {
    "qkv_bias": (_OFF, _ADVICE_BRIDGE),
    "use_qk_norm": ((True, None), _ADVICE_BRIDGE),
}
_NO_WINDOW: dict[str, tuple[tuple[Any, ...], str]] = {"sliding_window": ((None,), _WINDOW_ADVICE)}
# Qwen's window and the layers it holds for mean nothing while use_sliding_window is false.
_QWEN_NEUTRAL = frozenset({"sliding_window", "max_window_layers"})
_OLD_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            rules=_ATTENTION + _MLP,
            required=_NO_WINDOW,
            ignored_tensors=_OLD_BUFFERS,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            rules=_ATTENTION + _MLP,
            required=_NO_WINDOW,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            ignored_tensors=_OLD_BUFFERS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            rules=_ATTENTION + _QKV_BIAS + _MLP,
            qkv_bias=True,
            required=_QWEN_WINDOW,
            defaults={"num_key_value_heads": 32},
            neutral=_QWEN_NEUTRAL,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            rules=_ATTENTION + _QK_NORM + _MLP,
            qk_norm=True,
            required=_QWEN3,
            defaults={"num_key_value_heads": 32, "head_dim": 128},
            neutral=_QWEN_NEUTRAL,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            rules=_ATTENTION + _QK_NORM + _EXPERTS,
            qk_norm=True,
            experts=True,
            required=_QWEN3
            | {
                "shared_expert_intermediate_size": ((0, None), _ADVICE_BRIDGE),
                "decoder_sparse_step": ((1,), "every layer must hold experts; " + _ADVICE_BRIDGE),
                "mlp_only_layers": (([], None), "every layer must hold experts; " + _ADVICE_BRIDGE),
            },
            defaults={"num_key_value_heads": 4, "norm_topk_prob": False},
            # The auxiliary loss is a matter of training: --moe-aux-loss-coeff.
            neutral=_QWEN_NEUTRAL | {"router_aux_loss_coef", "output_router_logits"},
        ),
    )
}

"""The model families that are converted: one table each.

A table says which tensors a Hugging Face folder of the family holds, of which shapes, and where each lives in a
Megatron checkpoint; and which fields of config.json it has beside those of `config_fields.py`. Adding a family is
adding a `Family` here.

The Hugging Face side is stated by `transformers/models/*/{configuration,modeling}_*.py`, the Megatron side by
`megatron/core/models/gpt/gpt_layer_specs.py`, `models/hybrid/hybrid_layer_specs.py` and `transformer/attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_idft.checkpoint.config_fields import (
    EXPERTS,
    NO_QK_NORM,
    NO_QKV_BIAS,
    QK_NORM,
    QKV_BIAS,
    SLIDING_WINDOW,
    SWITCHED_WINDOW,
    Check,
)

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
        checked: fields of config.json that must have one of a few values, beside those of every family.
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
    checked: dict[str, Check] = field(default_factory=dict)
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

# Qwen's window and the layers it holds for mean nothing while use_sliding_window is false.
_QWEN_NEUTRAL = frozenset({"sliding_window", "max_window_layers"})
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096}
_OLD_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            rules=_ATTENTION + _MLP,
            checked=SLIDING_WINDOW | NO_QKV_BIAS | NO_QK_NORM,
            ignored_tensors=_OLD_BUFFERS,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            rules=_ATTENTION + _MLP,
            checked=SLIDING_WINDOW | NO_QKV_BIAS | NO_QK_NORM,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            ignored_tensors=_OLD_BUFFERS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            rules=_ATTENTION + _QKV_BIAS + _MLP,
            qkv_bias=True,
            checked=SWITCHED_WINDOW | QKV_BIAS | NO_QK_NORM,
            defaults=_QWEN_DEFAULTS,
            neutral=_QWEN_NEUTRAL,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            rules=_ATTENTION + _QK_NORM + _MLP,
            qk_norm=True,
            checked=SWITCHED_WINDOW | NO_QKV_BIAS | QK_NORM,
            defaults=_QWEN_DEFAULTS | {"head_dim": 128},
            neutral=_QWEN_NEUTRAL,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            rules=_ATTENTION + _QK_NORM + _EXPERTS,
            qk_norm=True,
            experts=True,
            checked=SWITCHED_WINDOW | NO_QKV_BIAS | QK_NORM | EXPERTS,
            defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 4, "norm_topk_prob": False},
            # The auxiliary loss is a matter of training: --moe-aux-loss-coeff.
            neutral=_QWEN_NEUTRAL | {"router_aux_loss_coef", "output_router_logits"},
        ),
    )
}

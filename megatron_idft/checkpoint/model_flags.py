"""A model's Megatron flags, and the same as the arguments that a checkpoint records."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_idft.checkpoint.config import ModelShape
from megatron_idft.checkpoint.config_fields import WINDOWS
from megatron_idft.errors import ConversionError

ModelClass = Literal["gpt", "hybrid"]
VOCABULARY_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by


@dataclass(frozen=True)
class Setting:
    """One of Megatron's arguments.

    Attributes:
        name: its attribute in Megatron's arguments.
        value: what it must be.
        flag: that sets it.
        words: of the command line that make it so: the flag and its value, or none if it is so without the flag.
        fixed: whether another value is another model. Otherwise the user may choose.
    """

    name: str
    value: Any
    flag: str
    words: tuple[str, ...]
    fixed: bool = True


def padded_vocabulary(vocab: int) -> int:
    """Rows of embedding and head in the checkpoint: a multiple of 128, so of every usual tensor-parallel size.

    Megatron loads embedding and head at any padded size (`allow_shape_mismatch` of tensor_parallel/layers.py): rows
    above the checkpoint's are zeros, rows that it lacks are left out.
    """
    return -(-vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def hybrid_pattern(model: ModelShape) -> str:
    """The --hybrid-layer-pattern of the same model as a HybridModel."""
    return ("*E" if model.experts else "*-") * model.layers


def why_not_hybrid(model: ModelShape) -> str:
    """What of the model HybridModel lacks, "" if it can be one."""
    if model.rope_scaling_factor is None:
        return ""
    return "HybridModel has no Llama-3 rope scaling (megatron/core/models/hybrid/hybrid_model.py)"


def megatron_settings(model: ModelShape, model_class: ModelClass) -> list[Setting]:
    """Everything that makes Megatron's model compute what transformers' does.

    Raises:
        ConversionError: a model that the class cannot be.
    """
    settings: list[Setting] = []

    def value(name: str, flag: str, content: Any, fixed: bool = True) -> None:
        settings.append(Setting(name, content, flag, (flag, str(content)), fixed))

    def switch(name: str, flag: str, on: bool, when_on: bool = True) -> None:
        settings.append(Setting(name, when_on if on else not when_on, flag, (flag,) if on else ()))

    if model_class == "hybrid":
        if lacking := why_not_hybrid(model):
            raise ConversionError(f"{lacking}: make it a GPTModel (--model gpt, or --hf-model-class gpt)")
        value("hybrid_layer_pattern", "--hybrid-layer-pattern", hybrid_pattern(model), fixed=False)  # may gain '|'
    else:
        value("num_layers", "--num-layers", model.layers)
    value("hidden_size", "--hidden-size", model.hidden)
    value("ffn_hidden_size", "--ffn-hidden-size", model.ffn)
    value("num_attention_heads", "--num-attention-heads", model.heads)
    value("kv_channels", "--kv-channels", model.head_dim)
    switch("group_query_attention", "--group-query-attention", model.groups != model.heads)
    if model.groups != model.heads:
        value("num_query_groups", "--num-query-groups", model.groups)
    value("position_embedding_type", "--position-embedding-type", "rope")
    value("rotary_base", "--rotary-base", model.rope_theta)
    switch("use_rope_scaling", "--use-rope-scaling", model.rope_scaling_factor is not None)
    if model.rope_scaling_factor is not None:
        value("rope_scaling_factor", "--rope-scaling-factor", model.rope_scaling_factor)
    windowed = not WINDOWS.isdisjoint(model.ignored_by_user)  # more positions would then be another model
    value("max_position_embeddings", "--max-position-embeddings", model.max_positions, fixed=windowed)
    value("normalization", "--normalization", "RMSNorm")
    value("layernorm_epsilon", "--norm-epsilon", model.norm_eps)
    switch("swiglu", "--swiglu", True)
    switch("add_bias_linear", "--disable-bias-linear", True, when_on=False)
    switch("add_qkv_bias", "--add-qkv-bias", model.family.qkv_bias)
    switch("qk_layernorm", "--qk-layernorm", model.family.qk_norm)
    switch("untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights", not model.tied)
    value("padded_vocab_size", "--padded-vocab-size", padded_vocabulary(model.vocab), fixed=False)
    if model.experts:
        value("num_experts", "--num-experts", model.experts)
        value("moe_ffn_hidden_size", "--moe-ffn-hidden-size", model.expert_ffn)
        value("moe_router_topk", "--moe-router-topk", model.experts_per_token)
        # Softmax over the chosen experts is softmax over all of them, renormalised.
        switch("moe_router_pre_softmax", "--moe-router-pre-softmax", not model.normalise_top_k)
    value("init_method_std", "--init-method-std", model.init_std, fixed=False)
    value("attention_dropout", "--attention-dropout", model.attention_dropout, fixed=False)
    value("hidden_dropout", "--hidden-dropout", 0.0, fixed=False)
    return settings


def checkpoint_args(model: ModelShape, model_class: ModelClass) -> argparse.Namespace:
    """The arguments of a checkpoint that Megatron reads, in training/checkpointing.py, for a model at rest.

    `load_args_from_checkpoint` (--use-checkpoint-args) takes most of the model's settings from them, and
    `check_checkpoint_args` compares some. Plain values only: they are loaded with `weights_only`.
    """
    args = {setting.name: setting.value for setting in megatron_settings(model, model_class)}
    if model_class == "hybrid":
        args["num_layers"] = len(hybrid_pattern(model))
    if model.ignored_by_user:
        args["ignore_config"] = list(model.ignored_by_user)  # for the way back
    return argparse.Namespace(
        **args,
        add_position_embedding=True,
        rotary_percent=1.0,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,  # there is no optimizer state here, and no random state
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def differences(settings: Iterable[Setting], args: argparse.Namespace) -> list[str]:
    """One line per fixed setting that a checkpoint's arguments have otherwise. Arguments it lacks are not compared."""
    missing = object()
    return [
        f"{setting.name}: {found!r} in the checkpoint, {setting.value!r} in config.json"
        for setting in settings
        if setting.fixed and (found := getattr(args, setting.name, missing)) is not missing and found != setting.value
    ]


def write_flags_file(path: Path, model: ModelShape, model_class: ModelClass) -> None:
    """A bash file to source: MODEL_FLAGS, an array of the Megatron flags, and VOCAB_SIZE, the true vocabulary."""
    lines = [
        "# The Megatron flags of this model, for launch scripts:",
        '#   source model_flags.sh; torchrun ... "${MODEL_FLAGS[@]}" ...',
        "MODEL_FLAGS=(",
        *(f"    {shlex.join(setting.words)}" for setting in megatron_settings(model, model_class) if setting.words),
        ")",
        f"VOCAB_SIZE={model.vocab}  # true rows, without Megatron's padding: for --sft-loss-vocab-size",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

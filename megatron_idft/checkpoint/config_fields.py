"""Every field of config.json has one of four fates: it is read, it is checked, it is ignored, or it is refused.

Read and checked fields are known by name: `READ` decides the model; a checked field must have a value for which
Megatron's model computes the same. Of the fields that no table knows, one is refused whose value could change what a
model computes (`could_matter`). The others are ignored, and the programs say which. `--ignore-config FIELD` ignores a
field that would be refused, on the user's word.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_idft.checkpoint.config_values import shown, shown_name

FLAG = "--ignore-config"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that decide the model.
READ = _names(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    tie_word_embeddings initializer_range attention_dropout torch_dtype dtype layer_types
    """
)
READ_EXPERTS = _names("num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob")
# Fields of transformers' own that say how to call a model, who saved it or how it was made.
NEUTRAL = _names(
    """
    _name_or_path name_or_path _model_name_or_path model_name transformers_version _commit_hash _diffusers_version
    use_cache tokenizer_class output_attentions output_hidden_states return_dict use_return_dict torchscript
    chunk_size_feed_forward use_bfloat16 _attn_implementation_autoset _attn_implementation
    _attn_implementation_internal attn_implementation experts_implementation _experts_implementation
    keys_to_ignore_at_inference tf_legacy_loss problem_type id2label label2id num_labels task_specific_params
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    finetuning_task prefix is_llama_config pretraining_tp max_sequence_length model_max_length tie_last_hidden_states
    """
)
# Of a generation, which transformers 4 kept in config.json, too; 5 drops them when it reads the file.
_GENERATION = _names(
    """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length min_new_tokens min_p
    no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    suppress_tokens target_lookbehind temperature top_k top_p typical_p
    """
)
# Of training and serving tools: how they ran the same model, or what they did to it. A kernel's switch, a length that
# somebody trained at, a tokenizer's setting; LLaMA-Factory's share of shifted attention, which is for training.
_TOOLS = _names(
    """
    transformers.js_config gradient_checkpointing use_gradient_checkpointing trust_remote_code low_cpu_mem_usage
    device_map use_flash_attn use_flash_attn_2 use_flash_attention use_flash_attention_2 use_flashattn flash_attention
    use_sdpa max_seq_len max_seq_length seq_length context_length add_bos_token add_eos_token classifier_dropout
    group_size_ratio
    """
)
_TOOL_PREFIXES = ("_", "unsloth_", "lora_")  # a folder with weights of LoRA is refused by its tensors
_TOKENS = ("_token_id", "_token_ids")


def could_matter(name: str, value: Any) -> bool:
    """Whether a field that no table knows could change what a model computes: unless it is text, or off, or a tool's.

    "Off" is null, false, 0 and what is empty. transformers adds a feature with a field whose default leaves old models
    as they are, and such fields are named after the feature. The exceptions are known by name, as are the texts that
    choose a computation: see `CHECKED`. Whether embeddings are tied the tensors show, however the field is called.
    """
    if name.startswith(_TOOL_PREFIXES) or name.endswith(_TOKENS) or name in _TOOLS or name in _GENERATION:
        return False
    return not isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class Check:
    """The values of a field with which Megatron's model computes the same.

    Attributes:
        served: the values. A field that is not there is as good.
        remedy: for others.
        ignorable: whether another value need not change the computation, so that the user may say that it does not.
    """

    served: tuple[Any, ...]
    remedy: str
    ignorable: bool = False


_BRIDGE = "Megatron-Bridge may serve it: pip install megatron-bridge, then run the same command"
_OFF, _ON, _ONE = (False, None), (True, None), (1, 1.0, None)
_WINDOW = (
    "Megatron's model would attend to the whole sequence, which is the same up to the window: {flag} serves the model"
    " with that many positions"
)


def checks(served: tuple[Any, ...], names: str) -> dict[str, Check]:
    """The same check of several fields."""
    return {name: Check(served, _BRIDGE) for name in names.split()}


def quantised(*names: str) -> dict[str, Check]:
    """Fields that say how the weights are quantised. Weights that are, their dtype and names show in any case."""
    remedy = "take the model as it was before it was quantised. If the weights here are not, pass"
    return {name: Check((None,), f"{remedy} {FLAG} {name}", ignorable=True) for name in names}


# Of every family. With another value, or by another implementation than transformers', it would be another model.
CHECKED: dict[str, Check] = {
    **checks(("silu", "swish"), "hidden_act"),
    **checks(("silu", "swish", "swiglu", None), "hidden_activation activation_function activation"),
    **checks(("rope", "rotary", None), "position_embedding_type"),
    **checks(("default", None), "rope_type"),
    **checks(("full_attention", "full", "causal", None), "attention_type attn_type"),
    **checks(("rmsnorm", "rms_norm", "RMSNorm", None), "norm_type normalization normalization_type layernorm_type"),
    **checks(("swiglu", "gated", None), "mlp_type ffn_type"),
    **checks(_ON, "is_causal causal use_rope scale_attn_weights use_rms_norm use_rmsnorm use_swiglu"),
    **checks(_OFF, "mlp_bias use_bias is_encoder_decoder is_decoder add_cross_attention tie_encoder_decoder"),
    **checks(_OFF, "rope_interleaved use_mrope use_bidirectional_attention"),
    **checks(_ONE, "partial_rotary_factor rotary_pct embedding_multiplier residual_multiplier logits_scaling"),
    **checks(_ONE, "logit_scale scale_emb"),
    **checks((None,), "cross_attention_hidden_size attention_multiplier query_pre_attn_scalar"),
    "attention_bias": Check(_OFF, "biases of the attention's output have no place in the mapping; " + _BRIDGE),
    "pruned_heads": Check(({}, None), _BRIDGE),
    "per_layer_config": Check(({}, None), "all layers must be the same; " + _BRIDGE),
    **quantised("quantization_config", "compression_config", "quantization"),  # the last is MLX's
    "auto_map": Check(
        ({}, None),
        "the model brings code of its own, which is never run here. If transformers' own class computes the same, pass"
        f" {FLAG} auto_map",
        ignorable=True,
    ),
    "transformers_weights": Check(
        ("model.safetensors", "model.safetensors.index.json", None), "the weights are read from the files so named"
    ),
}
SLIDING_WINDOW = {"sliding_window": Check((None,), _WINDOW.format(flag=f"{FLAG} sliding_window"), ignorable=True)}
SWITCHED_WINDOW = {"use_sliding_window": Check(_OFF, _WINDOW.format(flag=f"{FLAG} use_sliding_window"), ignorable=True)}
WINDOWS = frozenset({*SLIDING_WINDOW, *SWITCHED_WINDOW})
QKV_BIAS, NO_QKV_BIAS = checks(_ON, "qkv_bias use_qkv_bias"), checks(_OFF, "qkv_bias use_qkv_bias")
QK_NORM, NO_QK_NORM = checks(_ON, "use_qk_norm qk_norm"), checks(_OFF, "use_qk_norm qk_norm")
EXPERTS = {
    **checks((0, None), "shared_expert_intermediate_size"),
    **checks(("softmax", None), "scoring_func"),
    **checks(("greedy", None), "topk_method"),
    **checks(_ONE, "routed_scaling_factor"),
    "decoder_sparse_step": Check((1,), "every layer must hold experts; " + _BRIDGE),
    "mlp_only_layers": Check(([], None), "every layer must hold experts; " + _BRIDGE),
}


@dataclass(frozen=True)
class Account:
    """What becomes of the fields that are not read.

    Attributes:
        faults: of the fields that are refused, one line each.
        ignored: fields that are not known, or a tool's, and cannot matter.
        ignored_by_user: fields that would be refused without `--ignore-config`.
    """

    faults: list[str]
    ignored: tuple[str, ...]
    ignored_by_user: tuple[str, ...]


def account(
    config: dict[str, Any],
    read: frozenset[str],
    checked: dict[str, Check],
    neutral: frozenset[str],
    ignore: Iterable[str] = (),
) -> Account:
    """What becomes of the fields of `config` that are not read.

    Args:
        config: with the family's defaults.
        read: the fields that are read.
        checked: the fields that are checked.
        neutral: the fields that are known to have no part in the forward pass.
        ignore: the names given to `--ignore-config`.
    """
    names = set(ignore)
    faults = [fault for name in sorted(names) if (fault := _not_ignorable(name, config, read, checked))]
    ignored, by_user = [], []
    for name in sorted(config.keys() - read - neutral):
        why = _refusal(name, config[name], checked)
        if why is None:
            ignored += [name] * (name not in checked)
        elif name in names and (name not in checked or checked[name].ignorable):
            by_user.append(name)
        else:
            faults.append(why)
    return Account(faults, tuple(ignored), tuple(by_user))


def _refusal(name: str, value: Any, checked: dict[str, Check]) -> str | None:
    """Why a field is refused, with the remedy; None if it is not."""
    if name in checked:
        check = checked[name]
        if any(_same(value, served) for served in check.served):
            return None
        return f"{name} is {shown(value)}, only {' or '.join(map(shown, check.served))} is served: {check.remedy}"
    if not could_matter(name, value):
        return None
    return (
        f"{shown_name(name)} ({shown(value)}) is not known to the conversion, and could change what the model computes."
        f" If it does not, pass {FLAG} {_word(name)}"
    )


def _not_ignorable(name: str, config: dict[str, Any], read: frozenset[str], checked: dict[str, Check]) -> str | None:
    if name not in config:
        nearest = difflib.get_close_matches(name[:100], config, n=1)
        meant = f"; did you mean {_word(nearest[0])}?" if nearest else ". Drop it, or correct its name"
        return f"{FLAG} {_word(name)}: there is no such field{meant}"
    if name in read or (name in checked and not checked[name].ignorable):
        return f"{FLAG} {_word(name)}: the model depends on this field. Drop the flag, or correct a copy of config.json"
    return None


def _word(name: str) -> str:
    """A name as a word of a shell's command line."""
    text = shown_name(name)
    return shlex.quote(name) if text == name else f"${text}"


def _same(value: Any, served: Any) -> bool:
    """Equal and of one type: 1 is not true, and 0 is not false."""
    return type(value) is type(served) and value == served

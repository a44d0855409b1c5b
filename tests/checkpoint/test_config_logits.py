"""A field of config.json that changes transformers' logits is refused, or reaches the flags of Megatron's model."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from megatron_idft.checkpoint.config import read_model
from megatron_idft.checkpoint.families import FAMILIES
from megatron_idft.checkpoint.model_flags import megatron_settings
from megatron_idft.errors import ConversionError
from tests import tiny_models

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"rope_theta": 10000.0, "original_max_position_embeddings": 8192}
_ROPES: list[Any] = [
    _LLAMA3,
    _LLAMA3 | {"original_max_position_embeddings": 16},
    _LLAMA3 | {"low_freq_factor": 0.5},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
]
# Fields that transformers reads without declaring them in these classes, and fields that nobody reads.
_EXTRA: dict[str, list[Any]] = {
    "is_causal": [False, True],
    "attention_chunk_size": [4],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.5}}],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2],
    "sliding_window": [4],
    "rope_scaling": _ROPES,
    "rope_parameters": _ROPES,
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.5],
    "original_max_position_embeddings": [16],
    "attn_implementation": ["sdpa"],
    "experts_implementation": ["eager"],
    "num_experts": [4],
    "attention_bias": [True],
    "hidden_act": ["gelu", "relu", "swish"],
    "unknown": [True, False, 0, 7, "text", [], {}, {"a": 1}],
}


def _changes(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if name in ("model_type", "architectures", "transformers_version") or name in _EXTRA:
            continue
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield from ((name, value * 2), (name, max(1, value // 2)))
        elif isinstance(value, float):
            yield from ((name, value * 3 + 0.1), (name, 0.0))
        elif value is None:
            yield from ((name, 1), (name, True))
    for name, values in _EXTRA.items():
        yield from ((name, value) for value in values)


def _logits(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """transformers' logits of a config with weights; None if it refuses either."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(json.dumps({name: value for name, value in config.items() if name != "model_type"}))
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
        model.load_state_dict(weights)
        with torch.no_grad():
            return model.eval()(tiny_models.tokens(64)[:, :24]).logits
    except Exception:  # of any class: what matters is that it does not compute
        return None


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 4 declares other fields, and masks by a window that use_sliding_window switches off",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_that_changes_logits_is_passed_over(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts": 4}
    shape |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "initializer_range": 0.3, "sliding_window": None}
    if family != "qwen3_moe":
        shape = {name: value for name, value in shape.items() if "expert" not in name and "moe" not in name}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    base, weights = json.loads(model.config.to_json_string(use_diff=False)), model.state_dict()
    base["architectures"] = [FAMILIES[family].architecture]
    logits, settings = _logits(base, weights), megatron_settings(read_model(base), "gpt")
    assert logits is not None
    changed, passed_over = set(), []
    for name, value in _changes(base):
        other = _logits(base | {name: value}, weights)
        if other is not None and torch.equal(other, logits):
            continue
        changed.add(name)
        try:
            served = megatron_settings(read_model(base | {name: value}), "gpt")
        except ConversionError:
            continue
        if served == settings and other is not None:
            passed_over.append((name, value))
    assert not passed_over
    assert {"rms_norm_eps", "hidden_act", "is_causal", "rope_parameters", "per_layer_config"} <= changed


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_changes_nothing_up_to_its_length(family):
    """Which is why a model whose window is ignored has so many positions, and no more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(1)
    models = []
    for window in (
        {"sliding_window": None},
        {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0},
    ):
        models.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | window)).eval())
    models[1].load_state_dict(models[0].state_dict())
    for length, same in ((24, True), (25, False)):
        with torch.no_grad():
            without, within = (model(tiny_models.tokens(64)[:, :length]).logits for model in models)
        assert torch.allclose(without, within, atol=1e-5) == same

"""Small random-initialised models of every family, as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch

LENGTH = 48
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
# Vocabularies that are a multiple of 128 and that are not; heads wider than hidden / heads, and as wide; tied and not.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 256, "head_dim": 32, "rope_parameters": _LLAMA3},
    "llama-tied": {
        "model_type": "llama",
        "vocab_size": 131,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
    "mistral": {
        "model_type": "mistral",
        "vocab_size": 200,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2": {"model_type": "qwen2", "vocab_size": 128, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "vocab_size": 257, "head_dim": 24, "rms_norm_eps": 1e-5},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 128,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe-raw": {
        "model_type": "qwen3_moe",
        "vocab_size": 150,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}


def build(name: str, **changes: Any) -> torch.nn.Module:
    """A model in fp32 whose every parameter is random: norms are not 1, biases not 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _BASE | MODELS[name] | changes
    if rope := settings.get("rope_parameters"):  # transformers 4's two fields, which 5 reads as well
        settings["rope_theta"] = rope["rope_theta"]
        settings["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(name: str, folder: Path, max_shard_size: str = "5GB", **changes: Any) -> torch.nn.Module:
    model = build(name, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def dtype_of(folder: Path) -> str:
    """The dtype in config.json, under the name that this version of transformers writes."""
    config = json.loads((folder / "config.json").read_text())
    return config["dtype"] if "dtype" in config else config["torch_dtype"]


def tokens(vocab: int, length: int = LENGTH) -> torch.Tensor:
    """int64 [2, length], the last token of the vocabulary among them."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, vocab, (2, length), generator=generator)
    drawn[0, 3] = vocab - 1
    return drawn

"""config.json -> the model's shape, refusing by name whatever the conversion does not cover."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.families import FAMILIES, NEUTRAL, READ, READ_EXPERTS, REQUIRED, Family
from megatron_idft.errors import InputError

# What megatron/core/models/common/embeddings/rotary_pos_embedding.py (_apply_scaling) has written out.
_LLAMA3_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


class ConversionError(InputError):
    """A model or checkpoint that cannot be converted as it is; the message names everything found and the remedy."""


class UnknownFamilyError(ConversionError):
    """config.json names a model_type without a table in `families.py`."""


@dataclass(frozen=True)
class ModelShape:
    """What decides the tensors and the Megatron flags of a model.

    vocab: rows of the Hugging Face embedding, the true vocabulary. rope_scaling_factor: of Llama 3's scaling, None
    without. experts, expert_ffn, experts_per_token: 0 in a dense model.
    """

    family: Family
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: int
    rope_scaling_factor: float | None
    tied: bool
    init_std: float
    attention_dropout: float
    experts: int = 0
    expert_ffn: int = 0
    experts_per_token: int = 0
    normalise_top_k: bool = False

    def dimension(self, name: str) -> int:
        """The size of a dimension named in `families.py`."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "head_dim": self.head_dim,
            "query": self.heads * self.head_dim,
            "key": self.groups * self.head_dim,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
        }
        return sizes[name]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, as JSON; no code of the folder is run.

    Raises:
        ConversionError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} does not hold a JSON object")
    return config


def read_model(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that `config` describes.

    Raises:
        UnknownFamilyError: no table for its model_type.
        ConversionError: naming every field that is missing, unknown or has a value that is not served.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnknownFamilyError(
            f"{where}: model_type {kind!r} has no conversion table; there are tables for {', '.join(FAMILIES)}."
            " Megatron-Bridge converts more families: where it is installed, `megatron-idft convert` uses it"
        )
    family = FAMILIES[kind]
    config = family.defaults | config
    faults = _refused_fields(config, family)
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    needed += ["intermediate_size", "rms_norm_eps"]
    if family.experts:
        needed += ["num_experts_per_tok", "moe_intermediate_size"]
        if "num_experts" not in config and "num_local_experts" not in config:
            needed.append("num_experts")
    faults += [f"{name} is missing" for name in needed if config.get(name) is None]
    theta, factor = _read_rope(config, faults)
    if faults:
        raise ConversionError(
            f"{where} ({kind}) cannot be converted:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim")
    return ModelShape(
        family=family,
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        ffn=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        groups=heads if config.get("num_key_value_heads") is None else int(config["num_key_value_heads"]),
        head_dim=int(config["hidden_size"]) // heads if head_dim is None else int(head_dim),
        max_positions=int(config["max_position_embeddings"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling_factor=factor,
        tied=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        experts=int(config.get("num_experts") or config["num_local_experts"]) if family.experts else 0,
        expert_ffn=int(config["moe_intermediate_size"]) if family.experts else 0,
        experts_per_token=int(config["num_experts_per_tok"]) if family.experts else 0,
        normalise_top_k=bool(config.get("norm_topk_prob")),
    )


def _refused_fields(config: dict[str, Any], family: Family) -> list[str]:
    required = REQUIRED | family.required
    known = READ | NEUTRAL | family.neutral | required.keys() | {"layer_types"}
    if family.experts:
        known |= READ_EXPERTS
    faults = []
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        faults.append(f"architectures {architectures}: only {family.architecture} is served")
    for name, (served, remedy) in required.items():
        if name in config and config[name] not in served:
            faults.append(f"{name} is {config[name]!r}, only {' or '.join(map(repr, served))} is served: {remedy}")
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if others:
        faults.append(f"layer_types holds {', '.join(others)}: only full_attention is served")
    faults += [
        f"{name} ({json.dumps(config[name])[:80]}) is not known to the conversion. If the model computes the same"
        " without it, take it out of a copy of config.json"
        for name in sorted(config.keys() - known)
    ]
    return faults


def _read_rope(config: dict[str, Any], faults: list[str]) -> tuple[int, float | None]:
    """(base, factor of Llama 3's scaling or None), from either of the two ways in which it is written."""
    # transformers 5 writes all of it into rope_parameters; before, rope_theta stood alone.
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        faults.append("rope partial_rotary_factor: only 1 is served")
    if theta is None or int(theta) != theta:
        faults.append(f"rope_theta is {theta}: Megatron's --rotary-base takes whole numbers")
        theta = 10000
    if kind == "default":
        if rope:
            faults.append(f"rope parameters {', '.join(sorted(rope))} without a rope_type that would use them")
        return int(theta), None
    if kind != "llama3":
        faults.append(f"rope type {kind!r} is not served, only 'default' and 'llama3'")
        return int(theta), None
    factor = rope.pop("factor", None)
    if factor is None:
        faults.append("rope_scaling of type llama3 without a factor")
    for name, only in _LLAMA3_SCALING.items():
        value = rope.pop(name, None)
        if value != only:
            faults.append(f"rope {name} is {value}: Megatron's --use-rope-scaling has {only} written out")
    if rope:
        faults.append(f"rope parameters {', '.join(sorted(rope))} are not known to the conversion")
    return int(theta), None if factor is None else float(factor)

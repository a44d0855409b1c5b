"""config.json -> the model's shape, refusing by name whatever the conversion does not cover."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.config_fields import CHECKED, NEUTRAL, READ, READ_EXPERTS, WINDOWS, account
from megatron_idft.checkpoint.config_values import (
    NUMBERS,
    ROPE_FACTOR,
    ROPE_THETA,
    disagreements,
    listed,
    shape_faults,
    shown,
    shown_name,
    value_faults,
)
from megatron_idft.checkpoint.families import FAMILIES, Family
from megatron_idft.checkpoint.ignored_config import ignored_lines
from megatron_idft.errors import ConversionError, InputError, UnknownFamilyError
from megatron_idft.links import refuse_links_out

# Constants of megatron/core/models/common/embeddings/rotary_pos_embedding.py (_apply_scaling).
_LLAMA3_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_MOST_BYTES = 4 << 20  # of config.json: those of published models have a few thousand


@dataclass(frozen=True)
class ModelShape:
    """The fields of config.json that decide the tensors and the Megatron flags of a model.

    Attributes:
        vocab: rows of the Hugging Face embedding, the true vocabulary.
        rope_scaling_factor: of Llama 3's scaling, None without.
        experts: 0 in a dense model, as `expert_ffn` and `experts_per_token` are.
        ignored: fields of config.json that the conversion does not know and that cannot matter.
        ignored_by_user: fields of config.json that `--ignore-config` has kept from being refused.
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
    ignored: tuple[str, ...] = field(default=(), compare=False)
    ignored_by_user: tuple[str, ...] = field(default=(), compare=False)

    def ignored_lines(self, where: str | Path) -> list[str]:
        """What to tell of the fields of config.json, at `where`, that are ignored; empty if there are none."""
        lines = ignored_lines(str(where), self.ignored, self.ignored_by_user)
        if not WINDOWS.isdisjoint(self.ignored_by_user):
            lines[-1] += f"; the model has {self.max_positions} positions then"
        return lines

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

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of JSON, which would otherwise silently have the last value of a name that stands there twice."""
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found and found[name] != value:
                raise ConversionError(
                    f"{path}: {shown_name(name)} stands there twice, as {shown(found[name])} and as {shown(value)}:"
                    " remove the wrong one"
                )
            found[name] = value
        return found

    try:
        if not path.is_file():
            raise ConversionError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        refuse_links_out(Path(folder), [path])
        if path.stat().st_size > _MOST_BYTES:
            raise ConversionError(f"{path} has {path.stat().st_size:,} bytes: no config.json of a model is that large")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} does not hold a JSON object")
    return config


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_vocabulary(folder: Path) -> int:
    """The true vocabulary that config.json of a folder names, of any family.

    Raises:
        ConversionError: it names none.
    """
    size = read_config(folder).get("vocab_size")
    fault = NUMBERS["vocab_size"].fault("vocab_size", size)
    if fault:
        raise ConversionError(f"{Path(folder) / 'config.json'}: {fault}")
    return int(size)  # type: ignore[arg-type]  # it has no fault


def read_folder_model(folder: Path, ignore: Iterable[str] = ()) -> ModelShape:
    """The shape that config.json of a Hugging Face folder describes; see `read_config` and `read_model`."""
    return read_model(read_config(folder), str(folder / "config.json"), ignore)


def read_model(config: dict[str, Any], where: str = "config.json", ignore: Iterable[str] = ()) -> ModelShape:
    """The shape that `config` describes.

    Args:
        config: config.json.
        where: its path.
        ignore: fields that would be refused and, on the user's word, do not change what the model computes.

    Raises:
        UnknownFamilyError: no table for its model_type.
        ConversionError: naming every field that is missing, has a value that is not served, or is not known and could
            change what the model computes.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnknownFamilyError(
            f"{where}: model_type {shown(kind)} has no conversion table; there are tables for {', '.join(FAMILIES)}."
            " Megatron-Bridge converts more families: where it is installed, `megatron-idft convert` uses it"
        )
    family = FAMILIES[kind]
    config = family.defaults | config
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    needed += ["intermediate_size", "rms_norm_eps"]
    if family.experts:
        needed += ["num_experts_per_tok", "moe_intermediate_size"]
        if config.get("num_local_experts") is None:
            needed.append("num_experts")
    faults = [f"{name} is missing" for name in needed if config.get(name) is None]
    read = READ | READ_EXPERTS if family.experts else READ
    faults += value_faults(config, read)
    if config.get("architectures") not in (None, [], [family.architecture]):
        faults.append(f"architectures {shown(config['architectures'])}: only {family.architecture} is served")
    fields = account(config, read, CHECKED | family.checked, NEUTRAL | family.neutral, ignore)
    faults += fields.faults + disagreements(config)
    window = _read_window(config, fields.ignored_by_user, faults)
    theta, factor = _read_rope(config, faults)
    _refuse(where, kind, faults)
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    head_dim, groups = config.get("head_dim"), config.get("num_key_value_heads") or heads
    experts = (config.get("num_experts") or config["num_local_experts"]) if family.experts else 0
    faults = shape_faults(hidden=hidden, heads=heads, groups=groups, head_dim=head_dim, layers=layers, experts=experts)
    if family.experts and config["num_experts_per_tok"] > experts:
        faults.append(f"num_experts_per_tok is {config['num_experts_per_tok']}, with {experts} experts")
    _refuse(where, kind, faults)
    return ModelShape(
        family=family,
        vocab=config["vocab_size"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        layers=layers,
        heads=heads,
        groups=groups,
        head_dim=hidden // heads if head_dim is None else head_dim,
        max_positions=min(config["max_position_embeddings"], window),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling_factor=factor,
        tied=bool(config.get("tie_word_embeddings")),
        init_std=0.02 if config.get("initializer_range") is None else float(config["initializer_range"]),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        experts=experts,
        expert_ffn=config["moe_intermediate_size"] if family.experts else 0,
        experts_per_token=config["num_experts_per_tok"] if family.experts else 0,
        normalise_top_k=bool(config.get("norm_topk_prob")),
        ignored=fields.ignored,
        ignored_by_user=fields.ignored_by_user,
    )


def _refuse(where: str, kind: str, faults: list[str]) -> None:
    if faults:
        raise ConversionError(listed(f"{where} ({kind}) cannot be converted", faults))


def _read_window(config: dict[str, Any], ignored_by_user: Iterable[str], faults: list[str]) -> int:
    """The positions that an ignored window leaves: up to it a model computes the same with and without."""
    ignored = not WINDOWS.isdisjoint(ignored_by_user)
    served = ["full_attention", "sliding_attention"] if ignored else ["full_attention"]
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        others = sorted({shown(kind) for kind in layer_types if kind not in served})
        if others:
            faults.append(f"layer_types holds {', '.join(others[:8])}: only full_attention is served")
    positions, window = NUMBERS["max_position_embeddings"], config.get("sliding_window")
    if not ignored or window is None:
        return int(positions.high)
    fault = positions.fault("sliding_window", window)
    faults += [fault] if fault else []
    return 1 if fault else int(window)


def _read_rope(config: dict[str, Any], faults: list[str]) -> tuple[int, float | None]:
    """(base, factor of Llama 3's scaling or None), from either of the two ways in which it is written."""
    # transformers 5 writes all of it into rope_parameters; before, rope_theta stood alone.
    written = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    rope: dict[str, Any] = {name: value for each in written if isinstance(each, dict) for name, value in each.items()}
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        faults.append("rope partial_rotary_factor: only 1.0 is served")
    fault = ROPE_THETA.fault("rope_theta", theta)
    if fault is None and theta != int(theta):
        fault = f"rope_theta is {theta}: Megatron's --rotary-base takes whole numbers"
    if fault:
        faults.append(fault)
        theta = 10000
    if kind == "default":
        if rope:
            faults.append(f"rope parameters {_names(rope)} without a rope_type that would use them")
        return int(theta), None
    if kind != "llama3":
        faults.append(f"rope type {shown(kind)} is not served, only 'default' and 'llama3'")
        return int(theta), None
    factor = rope.pop("factor", None)
    fault = ROPE_FACTOR.fault("rope factor", factor)
    if fault:
        faults.append(fault)
    for name, only in _LLAMA3_SCALING.items():
        value = rope.pop(name, None)
        if isinstance(value, bool) or value != only:
            faults.append(f"rope {name} is {shown(value)}: Megatron's --use-rope-scaling has {only} written out")
    if rope:
        faults.append(f"rope parameters {_names(rope)} are not known to the conversion")
    return int(theta), None if fault else float(factor)


def _names(rope: dict[str, Any]) -> str:
    return ", ".join(map(shown_name, sorted(rope)[:8]))

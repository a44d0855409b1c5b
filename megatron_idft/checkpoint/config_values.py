"""Type and range of every value of config.json that is read, so that nothing absurd is built or computed with.

The ranges are wide: several times what any published model has. They keep a damaged or hostile file from asking for
tensors that no machine holds, or for loops that never end.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LINES = 60  # of one message


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`.

    Attributes:
        whole: no fraction and no decimal point.
    """

    low: float
    high: float
    whole: bool = True

    def fault(self, name: str, value: Any) -> str | None:
        """The fault of a value, None if there is none. NaN is never within a range, and true is no number."""
        kinds = (int,) if self.whole else (int, float)
        if type(value) in kinds and self.low <= value <= self.high:
            return None
        kind = "a whole number" if self.whole else "a number"
        return f"{name} is {shown(value)}, should be {kind} from {self.low:,g} to {self.high:,g}"


NUMBERS = {
    "vocab_size": Number(1, 1 << 22),
    "hidden_size": Number(1, 1 << 16),
    "intermediate_size": Number(1, 1 << 20),
    "num_hidden_layers": Number(1, 4096),
    "num_attention_heads": Number(1, 4096),
    "num_key_value_heads": Number(1, 4096),
    "head_dim": Number(2, 4096),
    "max_position_embeddings": Number(1, 1 << 30),
    "rms_norm_eps": Number(0, 1, whole=False),
    "initializer_range": Number(0, 10, whole=False),
    "attention_dropout": Number(0, 1, whole=False),
    "num_experts": Number(1, 1 << 14),
    "num_local_experts": Number(1, 1 << 14),
    "num_experts_per_tok": Number(1, 1 << 14),
    "moe_intermediate_size": Number(1, 1 << 20),
}
ROPE_THETA = Number(1, 1e12, whole=False)
ROPE_FACTOR = Number(1, 1e6, whole=False)
_KINDS: dict[str, tuple[type, str]] = {
    "tie_word_embeddings": (bool, "true or false"),
    "norm_topk_prob": (bool, "true or false"),
    "torch_dtype": (str, "the name of a dtype"),
    "dtype": (str, "the name of a dtype"),
    "architectures": (list, "a list of names"),
    "layer_types": (list, "a list of names"),
    "rope_scaling": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
}
# Places of one quantity, old and new names of it. Where it is given twice, nobody can tell which one is meant.
_ONE_QUANTITY = (
    ("rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"),
    ("rope_scaling.rope_type", "rope_scaling.type", "rope_parameters.rope_type", "rope_parameters.type"),
    ("dtype", "torch_dtype"),
    ("num_experts", "num_local_experts"),
)
_ROPES = ("rope_scaling", "rope_parameters")
# Each has three tensors of its own: the largest published models have some twenty thousand.
_MOST_EXPERTS = 1 << 17


def value_faults(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The faults of the fields `names`, each by itself. A null is as good as leaving the field out."""
    faults = []
    for name in sorted(names):
        value = config.get(name)
        if value is None:
            continue
        if name in NUMBERS:
            faults.append(NUMBERS[name].fault(name, value))
        elif name in _KINDS:
            kind, expected = _KINDS[name]
            right = isinstance(value, kind)
            if isinstance(value, list):
                right = right and all(isinstance(item, str) for item in value)
            faults.append(None if right else f"{name} is {shown(value)}, should be {expected}")
    return [fault for fault in faults if fault is not None]


def disagreements(config: dict[str, Any]) -> list[str]:
    """Quantities that stand in two places with two values. A null is as good as leaving the field out."""
    named = {name for places in _ONE_QUANTITY for name in places}
    ropes = [rope for name in _ROPES if isinstance(rope := config.get(name), dict)]
    shared = sorted(ropes[0].keys() & ropes[1].keys()) if len(ropes) == 2 else []
    further = [tuple(f"{rope}.{name}" for rope in _ROPES) for name in shared if f"{_ROPES[0]}.{name}" not in named]
    faults = []
    for places in (*_ONE_QUANTITY, *further):
        given = [(place, value) for place in places if _plain(value := _at(config, place)) is not None]
        for place, value in given[1:]:
            first, other = given[0]
            if _plain(value) != _plain(other):
                both = f"{shown_name(first)} is {shown(other)}, but {shown_name(place)} is {shown(value)}"
                faults.append(f"{both}: they name one thing, so correct or remove the wrong one")
                break
    layers, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    if isinstance(kinds, list) and type(layers) is int and len(kinds) != layers:
        faults.append(f"num_hidden_layers is {shown(layers)}, but layer_types names {len(kinds)} layers")
    return faults


def _at(config: dict[str, Any], place: str) -> Any:
    outer, _, inner = place.partition(".")
    if not inner:
        return config.get(outer)
    return found.get(inner) if isinstance(found := config.get(outer), dict) else None


def _plain(value: Any) -> tuple[bool, Any] | None:
    """The value to compare; None for one that is left out, or that is no number, name or switch."""
    if isinstance(value, str):
        return False, value.removeprefix("torch.")
    return (isinstance(value, bool), value) if isinstance(value, bool | int | float) else None


def shape_faults(*, hidden: int, heads: int, groups: int, head_dim: int | None, layers: int, experts: int) -> list[str]:
    """The faults between values that are right by themselves.

    Args:
        hidden: size of a token's state.
        heads: of queries.
        groups: heads of keys and values.
        head_dim: None where hidden / heads decides it.
        layers: of the model.
        experts: 0 in a dense model.
    """
    faults = []
    if head_dim is None and hidden % heads:
        faults.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim")
    elif (hidden // heads if head_dim is None else head_dim) % 2:
        faults.append(
            f"head_dim is {hidden // heads if head_dim is None else head_dim}: rotary embeddings need an even one"
        )
    if heads % groups:
        faults.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if layers * experts > _MOST_EXPERTS:
        faults.append(f"num_hidden_layers {layers} times {experts} experts: at most {_MOST_EXPERTS:,} are served")
    return faults


def shown(value: Any) -> str:
    """A value in an error message: of bounded length and depth."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def shown_name(name: str) -> str:
    """The name of a field in an error message: bare if it is one, else as a value."""
    return name if len(name) <= 60 and name.isprintable() else shown(name)


def listed(title: str, faults: Iterable[str], most: int = _LINES) -> str:
    """A title and one line for each fault, `most` of them at most."""
    lines = [f"  - {fault}" for fault in faults]
    more = [f"  … and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([f"{title}:", *lines[:most], *more])

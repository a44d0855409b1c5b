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
    """A number from `low` to `high`. whole: no fraction and no decimal point."""

    low: float
    high: float
    whole: bool = True

    def fault(self, name: str, value: Any) -> str | None:
        """What is wrong with a value, None if nothing is. NaN is never within a range, and true is no number."""
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
# Each has three tensors of its own: the largest published models have some twenty thousand.
_MOST_EXPERTS = 1 << 17


def value_faults(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with the fields `names`, each by itself. A null is as good as leaving the field out."""
    faults = []
    for name in sorted(names):
        value = config.get(name)
        if value is None:
            continue
        if name in NUMBERS:
            faults.append(NUMBERS[name].fault(name, value))
        elif name in _KINDS:
            kind, told = _KINDS[name]
            right = isinstance(value, kind)
            if isinstance(value, list):
                right = right and all(isinstance(item, str) for item in value)
            faults.append(None if right else f"{name} is {shown(value)}, should be {told}")
    return [fault for fault in faults if fault is not None]


def shape_faults(*, hidden: int, heads: int, groups: int, head_dim: int | None, layers: int, experts: int) -> list[str]:
    """What is wrong between values that are right by themselves. head_dim: None where hidden / heads decides it."""
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

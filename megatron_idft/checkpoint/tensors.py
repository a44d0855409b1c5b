"""A family's table, spelled out for one model: every Megatron tensor piece by piece, and how pieces are joined and cut.

A piece is read, joined and written at one time: one tensor of one layer or expert, or a block of rows of the
vocabulary. Nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_idft.checkpoint.config import ModelShape
from megatron_idft.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, Layout, Rule
from megatron_idft.checkpoint.model_flags import ModelClass, padded_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 25  # elements of the largest block of vocabulary rows
_FINAL_NORM_NAMES = {"gpt": "decoder.final_layernorm.weight", "hybrid": "decoder.final_norm.weight"}


@dataclass(frozen=True)
class Part:
    """Rows `start` to `start + rows` of a Hugging Face tensor of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    rows: int

    @property
    def size(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:])


@dataclass(frozen=True)
class Piece:
    """A box of one Megatron tensor, made of parts of Hugging Face tensors.

    Attributes:
        key: name in the checkpoint.
        also: further names; `key` is read, all are written.
        shape: of the whole tensor, with leading axes for layers and experts.
        offset: where the box begins.
        size: of the box without the leading axes, each of which it fills one element of.
        parts: joined by `layout`; none means zeros.
    """

    key: str
    also: tuple[str, ...]
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    parts: tuple[Part, ...]
    layout: Layout

    @property
    def box(self) -> tuple[int, ...]:
        """The size of the box with the leading axes: same rank as `shape`."""
        return (1,) * (len(self.shape) - len(self.size)) + self.size


def pieces(model: ModelShape, model_class: ModelClass) -> Iterator[Piece]:
    """Every piece of the model, in the order of its layers.

    GPTModel stores equal layers as one tensor with a leading axis (`sharded_state_dict` of
    transformer/transformer_block.py); HybridModel numbers them and makes two of each (models/hybrid/hybrid_block.py).
    """
    yield from _vocabulary(EMBEDDING, model)
    for layer in range(model.layers):
        for rule in model.family.rules:
            place, axes, at = _layer(layer, rule.scope, model, model_class)
            if rule.scope == "expert":
                for expert in range(model.experts):
                    yield _piece(rule, model, place, layer, (*axes, model.experts), (*at, expert), expert)
            else:
                yield _piece(rule, model, place, layer, axes, at)
    (norm,) = FINAL_NORM.sources
    shape = (model.hidden,)
    yield Piece(
        _FINAL_NORM_NAMES[model_class], (), shape, (0,), shape, (Part(norm, shape, 0, model.hidden),), FINAL_NORM.layout
    )
    if not model.tied:
        yield from _vocabulary(HEAD, model)


def _layer(
    layer: int, scope: str, model: ModelShape, model_class: ModelClass
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(prefix of the names in this layer, the axes in front of its tensors, its place on them)."""
    if model_class == "gpt":
        return "decoder.layers.", (model.layers,), (layer,)
    return f"decoder.layers.{2 * layer + (scope != 'attention')}.", (), ()


def _piece(
    rule: Rule,
    model: ModelShape,
    place: str,
    layer: int,
    axes: tuple[int, ...],
    at: tuple[int, ...],
    expert: int | None = None,
) -> Piece:
    parts = []
    for name, dimensions in rule.sources.items():
        shape = tuple(map(model.dimension, dimensions))
        parts.append(Part(f"model.layers.{layer}.{name.format(expert=expert)}", shape, 0, shape[0]))
    size = (sum(part.rows for part in parts), *parts[0].shape[1:])
    also = () if not axes else tuple(place + name for name in rule.also)  # only GPTModel has other names
    offset = (*at, *(0 for _ in size))
    return Piece(place + rule.megatron, also, (*axes, *size), offset, size, tuple(parts), rule.layout)


def _vocabulary(rule: Rule, model: ModelShape) -> Iterator[Piece]:
    ((name, dimensions),) = rule.sources.items()
    shape = tuple(map(model.dimension, dimensions))
    padded = (padded_vocabulary(model.vocab), *shape[1:])
    step = max(1, BLOCK // math.prod(shape[1:]))
    for start in range(0, model.vocab, step):
        part = Part(name, shape, start, min(step, model.vocab - start))
        yield Piece(rule.megatron, (), padded, (start, 0), part.size, (part,), "copy")
    if padded[0] > model.vocab:
        size = (padded[0] - model.vocab, *shape[1:])
        yield Piece(rule.megatron, (), padded, (model.vocab, 0), size, (), "vocabulary")


def join(piece: Piece, parts: Sequence[Tensor], model: ModelShape) -> Tensor:
    """The content of the piece, of `piece.size`, in the parts' dtype."""
    import torch  # noqa: PLC0415  input_check.py does without

    if piece.layout == "qkv":
        # transformer/attention.py: for each group its queries, then its key, then its value.
        groups = [part.reshape(model.groups, part.shape[0] // model.groups, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).reshape(piece.size)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def cut(piece: Piece, content: Tensor, model: ModelShape) -> list[Tensor]:
    """The inverse of `join`: contiguous tensors, one per part."""
    if piece.layout == "qkv":
        groups = content.reshape(model.groups, content.shape[0] // model.groups, *content.shape[1:])
        split = groups.split([part.rows // model.groups for part in piece.parts], dim=1)
        return [group.reshape(part.size).contiguous() for group, part in zip(split, piece.parts, strict=True)]
    return [part.contiguous() for part in content.split([part.rows for part in piece.parts])]


def extra_states(model: ModelShape, model_class: ModelClass) -> Iterator[str]:
    """Names of the empty states that Megatron's linear layers, and all of Transformer Engine's modules, want to load.

    A missing one would end the load. The names are those of both implementations: unexpected ones are passed over
    (--dist-ckpt-strictness assume_ok_unexpected, Megatron's default). Form: `ShardedObject.unique_key`.
    """
    attention = ["linear_qkv", "linear_proj", "core_attention"]
    if model.family.qk_norm:
        attention += ["q_layernorm", "k_layernorm"]
    names: list[tuple[str, str]] = [("attention", f"self_attention.{name}") for name in attention]
    if model.experts:
        names += [("mlp", "pre_mlp_layernorm")]
        names += [("expert", f"mlp.experts.experts.linear_fc{number}") for number in (1, 2)]
    else:
        names += [("mlp", "mlp.linear_fc1"), ("mlp", "mlp.linear_fc2")]
    for layer in range(model.layers):
        for scope, name in names:
            place, axes, at = _layer(layer, scope, model, model_class)
            for expert in range(model.experts if scope == "expert" else 1):
                shape, offset = ((*axes, model.experts), (*at, expert)) if scope == "expert" else (axes, at)
                yield _object_name(f"{place}{name}", shape or (1,), offset or (0,))
    yield _object_name(_FINAL_NORM_NAMES[model_class].removesuffix(".weight"), (1,), (0,))
    if model_class == "hybrid":
        yield _object_name("output_layer", (1,), (0,))


def _object_name(module: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> str:
    return f"{module}._extra_state/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"

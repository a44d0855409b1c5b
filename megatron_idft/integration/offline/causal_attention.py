"""Causal attention by torch's kernel in the place of Megatron's local one, on the CPU, for passes without a gradient.

Megatron's DotProductAttention repeats keys and values for each query head, writes every score to memory and masks,
normalises and multiplies them one after another: a tenth of a scoring pass. And it needs rows of one length, so that
everything else is computed for their padding, too. Here records may follow each other in one row. On a GPU nothing is
replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_idft.integration.loss.hook import language_models


class Documents:
    """What the model is fed while `within` lasts: rows of one length, or documents that follow each other in one row.

    Args:
        model: the chunks of this rank. Without a GPU, every layer whose attention computes the same gets
            CausalAttention.

    Attributes:
        served: whether documents may follow each other: all attention is CausalAttention, and positions are ours.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        self.lengths: list[int] | None = None
        self._positions: Tensor | None = None
        if torch.cuda.is_available():
            self.served = False
            return
        layers = [module for chunk in model for module in chunk.modules() if hasattr(module, "core_attention")]
        replaceable = [layer for layer in layers if _replaceable(layer)]
        for layer in replaceable:
            layer.core_attention = CausalAttention(layer.core_attention, self)
        models = list(language_models(model))
        # The same on all pipeline stages, which have one config, though a stage may have no attention.
        self.served = len(replaceable) == len(layers) and all(_keeps_positions(each) for each in models)
        if self.served:
            for each in models:
                if each.position_embedding_type == "rope":
                    each.rotary_pos_emb.register_forward_hook(self._turn)

    @contextmanager
    def within(self, lengths: list[int], positions: Tensor) -> Iterator[None]:
        """While it lasts, the model's input is one row of documents.

        Args:
            lengths: of the documents, in their order; their sum is s.
            positions: int64 [s], of each token in its document.
        """
        self.lengths, self._positions = lengths, positions
        try:
            yield
        finally:
            self.lengths = self._positions = None

    def _turn(self, module: torch.nn.Module, args: tuple[Any, ...], angles: Tensor) -> Tensor | None:
        """Megatron turns token i of a row by the angles of position i, whatever its position is said to be."""
        return None if self._positions is None else angles[self._positions]


class CausalAttention(torch.nn.Module):
    """Stands in the place of a layer's `core_attention`; what it cannot serve goes to that one.

    Takes query [s, b, heads, d], key and value [s, b, kv_heads, d], returns [s, b, heads * d], like
    megatron/core/transformer/dot_product_attention.py.
    """

    def __init__(self, original: Any, documents: Documents) -> None:
        super().__init__()
        self.documents = documents
        self.original: Any
        self.__dict__["original"] = original  # no submodule: parameters and checkpoints stay as they were

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attention_mask is not None or torch.is_grad_enabled():
            attended: Tensor = self.original(query, key, value, attention_mask, *args, **kwargs)
            return attended
        lengths = self.documents.lengths or [len(query)]
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part) for part in parts])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.original.softmax_scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _keeps_positions(model: Any) -> bool:
    """Whether positions are what the batch or `_turn` says they are, and no head looks across documents' borders."""
    kind = getattr(model, "position_embedding_type", None)
    return kind in ("rope", "learned_absolute", "none") and not model.config.mtp_num_layers


def _replaceable(layer: Any) -> bool:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    attention = layer.core_attention
    if type(attention) is not DotProductAttention:
        return False
    config = attention.config
    return bool(
        layer.attn_mask_type == AttnMaskType.causal
        and config.softmax_type == "vanilla"
        and config.window_size is None
        and not config.apply_query_key_layer_scaling
    )

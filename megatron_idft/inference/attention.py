"""The attention of a layer over the cache: prompts that may begin with found blocks, and one token of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_idft.inference.block_runs import BlockRuns

if TYPE_CHECKING:
    from megatron_idft.inference.cache import KeyValueCache

_MASK_ELEMENTS = 1 << 26  # of one mask in a prefill with found blocks; longer prompts go through it in parts


@dataclass(frozen=True, slots=True)
class Prefill:
    """A batch [n, s] of tokens; padding stands on the right, where nobody looks before it is overwritten.

    Attributes:
        slots: int64 [n * s], where keys and values go; None: nothing is kept, as for scoring.
        seen: int64 [n, l], where the keys and values of positions 0 … l - 1 stand; None: those of the batch.
        positions: int64 [n, s], of the tokens; used with `seen`.
    """

    slots: Tensor | None = None
    seen: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One token of each row.

    Attributes:
        lengths: int64 [rows], its position.
        tables: int32 [rows, places], the rows' blocks; NOBODYS beyond them.
        slots: int64 [rows], where its key and value go.
        runs: on a CPU, the blocks that are read.
    """

    lengths: Tensor
    tables: Tensor
    slots: Tensor
    runs: BlockRuns | None


class CachedAttention(torch.nn.Module):
    """Stands in the place of a layer's `core_attention`; does what that did except while the cache has a plan.

    Takes query [s, n, heads, d], key and value [s, n, kv_heads, d], returns [s, n, heads * d], like upstream's
    (megatron/core/transformer/dot_product_attention.py). Heads of one key-value group become queries of that group in a
    decode step, so that keys and values are never repeated there.
    """

    def __init__(self, cache: KeyValueCache, layer: int, original: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self.cache, self.layer, self.scale = cache, layer, scale
        self.original: Any
        self.__dict__["original"] = original  # no submodule: parameters and checkpoints stay as they were

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self.cache.plan
        if plan is None:
            attended: Tensor = self.original(query, key, value, *args, **kwargs)
            return attended
        if isinstance(plan, Prefill):
            return self._prefill(plan, query, key, value)
        return self._decode(plan, query[0], key[0], value[0]).unsqueeze(0)

    def _prefill(self, plan: Prefill, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if plan.slots is not None:
            keys, values = self.cache.slots_of(self.layer)
            keys.index_copy_(0, plan.slots, key.transpose(0, 1).flatten(0, 1))
            values.index_copy_(0, plan.slots, value.transpose(0, 1).flatten(0, 1))
        if plan.seen is not None:
            return self._prefill_after(plan, query)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [n, heads, s, d]
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _prefill_after(self, plan: Prefill, query: Tensor) -> Tensor:
        """Prompts of which something was found, over a copy of all their keys and values."""
        assert plan.seen is not None and plan.positions is not None
        s, n, heads, d = query.shape
        # Repeated for the heads of a group: with a mask no kernel for GPUs takes groups.
        k, v = (
            x[plan.seen].repeat_interleave(heads // x.shape[1], 2).transpose(1, 2)
            for x in self.cache.slots_of(self.layer)
        )
        length = plan.seen.shape[1]
        everywhere = torch.arange(length, device=query.device)
        out = query.new_empty(s, n, heads, d)
        part = max(_MASK_ELEMENTS // (n * length), 1)
        for begin in range(0, s, part):
            seen = everywhere <= plan.positions[:, begin : begin + part, None]
            q = query[begin : begin + part].permute(1, 2, 0, 3)
            attended = scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), scale=self.scale)
            out[begin : begin + part] = attended.permute(2, 0, 1, 3)
        return out.flatten(2)

    def _decode(self, step: Step, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, d] -> [rows, heads * d]."""
        rows, heads, d = query.shape
        keys, values = self.cache.slots_of(self.layer)
        keys.index_copy_(0, step.slots, key)
        values.index_copy_(0, step.slots, value)
        keys, values = self.cache.blocks_of(self.layer)
        if step.runs is not None:
            return step.runs.attend(query.reshape(rows, key.shape[1], -1, d), keys, values, self.scale)
        if self.cache.flash_attention is not None:
            out = self.cache.flash_attention(
                query.unsqueeze(1),
                keys,
                values,
                cache_seqlens=step.lengths.int() + 1,
                block_table=step.tables,
                softmax_scale=self.scale,
                causal=True,
            )
            return torch.as_tensor(out).reshape(rows, heads * d)
        from megatron_idft.inference.paged_attention import paged_attention  # noqa: PLC0415  imports triton

        return paged_attention(query, keys, values, step.tables, step.lengths, self.scale).flatten(1)

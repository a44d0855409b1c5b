"""Keys and values of running sequences, in slots, and the attention that reads and writes them.

A bank is a set of slots of one capacity. Its sequences always fill the first slots: when one ends, the last one moves
into its place, so a decode step reads the first n slots as a view, whatever came and went. Streams with long prompts
and streams with short ones live in different banks, so that neither pays for the other's padding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_idft.errors import InputError
from megatron_idft.inference.served import ServedModel

_LENGTH_MULTIPLE = 64  # attention reads so many positions more than the longest sequence has, at most
# cuDNN's attention, which torch prefers since 2.11 on Hopper, makes a plan for each shape when it first occurs, and
# prefills and batches to score have a shape of their own nearly always.
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Bank:
    """Slots of `capacity` positions.

    keys, values: [layers, slots, capacity, kv_heads, d]. active: so many leading slots hold a sequence.
    tokens, lengths: int64 [slots], the token that each sequence is fed next and the position it goes to.
    """

    def __init__(self, storage: Tensor, slots: int, capacity: int) -> None:
        self.keys, self.values = storage
        self.slots, self.capacity, self.active = slots, capacity, 0
        self.tokens: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.lengths: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)

    def read_length(self) -> int:
        """How many leading positions the next decode step must see."""
        longest = int(self.lengths[: self.active].max()) + 1
        return min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.capacity)

    def take(self, prompt: NDArray[np.integer]) -> int:
        """The slot of a new sequence, whose prompt but for its last token is still to be prefilled."""
        slot = self.active
        self.tokens[slot], self.lengths[slot] = prompt[-1], len(prompt) - 1
        self.active += 1
        return slot

    def free(self, slot: int) -> int | None:
        """Give up a slot. Returns the slot whose sequence has moved into it, None if none had to."""
        last = self.active - 1
        self.active = last
        if slot == last:
            return None
        length = int(self.lengths[last])
        for cache in (self.keys, self.values):
            cache[:, slot, :length] = cache[:, last, :length]
        self.tokens[slot], self.lengths[slot] = self.tokens[last], self.lengths[last]
        return last


@dataclass(slots=True)
class _Prefill:
    """slots: int64 [n], of the rows of the batch. bank None: nothing is kept, as for scoring."""

    bank: Bank | None
    slots: Tensor


@dataclass(slots=True)
class BankStep:
    """One bank's part of a decode step: rows [begin, begin + n) of the batch, which are its slots [0, n).

    Attributes:
        lengths: int64 [n], where the new token's key and value go.
        read: how many positions are looked at.
    """

    bank: Bank
    begin: int
    lengths: Tensor
    read: int
    mask: Tensor | None = None  # [n, 1, 1, read], 0 or -inf, in the queries' dtype
    rows: Tensor | None = None  # int64 [n], 0 … n - 1

    @property
    def n(self) -> int:
        return len(self.lengths)


class SlotAttention(torch.nn.Module):
    """Stands in the place of a layer's `core_attention`; does what that did except while the cache has a plan.

    Takes query [s, n, heads, d], key and value [s, n, kv_heads, d], returns [s, n, heads * d], like upstream's
    (megatron/core/transformer/dot_product_attention.py). Heads of one key-value group become queries of that group, so
    that keys and values are never repeated.
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
        if isinstance(plan, _Prefill):
            return self._prefill(plan, query, key, value)
        outputs = [
            self._decode(step, *(x[0, step.begin : step.begin + step.n] for x in (query, key, value))) for step in plan
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _prefill(self, plan: _Prefill, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [n, heads, s, d]; padding stands on the right, where nobody looks before it is overwritten.
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if plan.bank is not None:
            length = key.shape[0]
            plan.bank.keys[self.layer][plan.slots, :length] = key.transpose(0, 1)
            plan.bank.values[self.layer][plan.slots, :length] = value.transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _decode(self, step: BankStep, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[n, heads, d] -> [n, heads * d]."""
        n, heads, d = query.shape
        keys, values = step.bank.keys[self.layer][:n], step.bank.values[self.layer][:n]
        if self.cache.flash_attention is not None:
            out = self.cache.flash_attention(
                query.unsqueeze(1),
                keys,
                values,
                k=key.unsqueeze(1),
                v=value.unsqueeze(1),
                cache_seqlens=step.lengths.int(),
                softmax_scale=self.scale,
                causal=True,
            )
            attended = torch.as_tensor(out)
            return attended.reshape(n, heads * d)
        keys[step.rows, step.lengths] = key
        values[step.rows, step.lengths] = value
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(n, key.shape[1], -1, d),
            keys[:, : step.read].transpose(1, 2),
            values[:, : step.read].transpose(1, 2),
            attn_mask=step.mask,
            scale=self.scale,
        )
        return out.reshape(n, heads * d)


class KeyValueCache:
    """The memory of the banks, and the attention modules that use it.

    Args:
        memory_bytes: the most that keys and values may take on this rank.
        cudnn: whether attention may be cuDNN's.
    """

    def __init__(self, model: ServedModel, memory_bytes: int) -> None:
        self.model, self.memory_bytes = model, memory_bytes
        self.plan: _Prefill | list[BankStep] | None = None
        self._storage: Tensor | None = None
        attention = model.attentions[0]
        self.kv_heads = attention.num_query_groups_per_partition
        self.head_size = attention.hidden_size_per_attention_head
        self.scale = model.config.softmax_scale or self.head_size**-0.5
        self.flash_attention = _flash_attention(model)
        self.cudnn = cudnn_allowed()
        for layer, module in enumerate(model.attentions):
            if not isinstance(module.core_attention, SlotAttention):
                module.core_attention = SlotAttention(self, layer, module.core_attention, self.scale)
            else:  # a second engine on this model: the latest owns the slots
                module.core_attention.cache = self

    def close(self) -> None:
        """Give the layers their own attention back, and the memory to whoever needs it."""
        for module in self.model.attentions:
            if isinstance(module.core_attention, SlotAttention) and module.core_attention.cache is self:
                module.core_attention = module.core_attention.original
        self._storage = None

    @property
    def bytes_per_token(self) -> int:
        itemsize = torch.empty((), dtype=self.model.dtype).element_size()
        return int(2 * len(self.model.attentions) * self.kv_heads * self.head_size * itemsize)

    @property
    def allocated_bytes(self) -> int:
        """Memory of the slots now: made for the largest call so far, within `memory_bytes`."""
        return 0 if self._storage is None else self._storage.numel() * self._storage.element_size()

    def banks(self, shapes: Sequence[tuple[int, int]]) -> list[Bank]:
        """Empty banks of (slots, capacity). Those of earlier calls are gone."""
        counts = [slots * capacity for slots, capacity in shapes]
        width = self.kv_heads * self.head_size
        layers = len(self.model.attentions)
        needed = 2 * layers * sum(counts) * width
        if self._storage is None or self._storage.numel() < needed:
            self._storage = None  # before the larger one is made
            # Zeros, not whatever lay there: a masked NaN is still NaN.
            self._storage = torch.zeros(needed, dtype=self.model.dtype, device=self.model.device)
        banks, begin = [], 0
        for (slots, capacity), count in zip(shapes, counts, strict=True):
            size = 2 * layers * count * width
            storage = self._storage[begin : begin + size]
            banks.append(Bank(storage.view(2, layers, slots, capacity, self.kv_heads, self.head_size), slots, capacity))
            begin += size
        return banks

    @contextmanager
    def prefilling(self, bank: Bank | None, slots: Tensor) -> Any:
        """While it lasts, attention is causal over the batch, and its keys and values go to `slots` [n] of the bank."""
        with self._planned(_Prefill(bank, slots)):
            yield

    @contextmanager
    def decoding(self, steps: list[BankStep]) -> Any:
        """While it lasts, the batch is one token of each sequence, which sees the slots' earlier ones."""
        for step in steps:
            step.rows = torch.arange(step.n, device=step.lengths.device)
            if self.flash_attention is None:
                seen = torch.arange(step.read, device=step.lengths.device) <= step.lengths.unsqueeze(1)
                mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
                step.mask = mask.masked_fill_(~seen, -torch.inf)[:, None, None, :]
        with self._planned(steps):
            yield

    @contextmanager
    def _planned(self, plan: _Prefill | list[BankStep]) -> Any:
        with ExitStack() as stack:
            if not self.cudnn:
                stack.enter_context(sdpa_kernel(_WITHOUT_PLANS))
            self.plan = plan
            try:
                yield
            finally:
                self.plan = None


def cudnn_allowed() -> bool:
    """Whether MEGATRON_IDFT_CUDNN_ATTENTION=1 lets torch choose cuDNN's attention, where it prefers that one."""
    value = os.environ.get("MEGATRON_IDFT_CUDNN_ATTENTION", "0")
    if value not in ("0", "1"):
        raise InputError(f"MEGATRON_IDFT_CUDNN_ATTENTION={value[:40]}: set it to 1 or 0")
    return value == "1"


def _flash_attention(model: ServedModel) -> Any:
    """flash-attn's kernel for caches with a length per row, where it is installed and serves the model."""
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache

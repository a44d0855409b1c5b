"""The memory of keys and values, in blocks, and the attention modules that use it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_idft.errors import InputError
from megatron_idft.inference.attention import CachedAttention, Prefill, Step
from megatron_idft.inference.block_runs import BlockRuns
from megatron_idft.inference.blocks import BlockPool, Copy, Row
from megatron_idft.inference.served import ServedModel

_POSITIONS_CPU, _POSITIONS_GPU = 128, 64  # of a block: a CPU's kernel costs as much for fewer
_POSITIONS_FLASH_ATTENTION = 256  # its block tables take multiples of it
_ALIGNMENT = 64
# cuDNN's attention, which torch prefers since 2.11 on Hopper, makes a plan for each shape when it first occurs, and
# prefills and batches to score have a shape of their own nearly always.
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KeyValueCache:
    """Keys and values [2, layers, blocks, positions, kv_heads, d] of one rank.

    Args:
        memory_bytes: the most that they may take on this rank.

    Attributes:
        pool: who holds which block.
        block_size: positions of a block; may be changed while there is no pool.
        cudnn: whether attention may be cuDNN's.
    """

    def __init__(self, model: ServedModel, memory_bytes: int) -> None:
        self.model, self.memory_bytes = model, memory_bytes
        self.plan: Prefill | Step | None = None
        self.pool: BlockPool | None = None
        self._storage: Tensor | None = None
        self._weights: list[tuple[int, int]] = []
        attention = model.attentions[0]
        self.kv_heads = attention.num_query_groups_per_partition
        self.head_size = attention.hidden_size_per_attention_head
        self.scale = model.config.softmax_scale or self.head_size**-0.5
        self.flash_attention = _flash_attention(model)
        self.block_size = _POSITIONS_CPU if model.device.type == "cpu" else _POSITIONS_GPU
        if self.flash_attention is not None:
            self.block_size = _POSITIONS_FLASH_ATTENTION
        self.cudnn = cudnn_allowed()
        for layer, module in enumerate(model.attentions):
            if not isinstance(module.core_attention, CachedAttention):
                module.core_attention = CachedAttention(self, layer, module.core_attention, self.scale)
            else:  # a second engine on this model: the latest owns the blocks
                module.core_attention.cache = self

    def close(self) -> None:
        """Give the layers their own attention back, and the memory to whoever needs it."""
        for module in self.model.attentions:
            if isinstance(module.core_attention, CachedAttention) and module.core_attention.cache is self:
                module.core_attention = module.core_attention.original
        self.pool = self._storage = None

    @property
    def bytes_per_token(self) -> int:
        itemsize = torch.empty((), dtype=self.model.dtype).element_size()
        return int(2 * len(self.model.attentions) * self.kv_heads * self.head_size * itemsize)

    @property
    def allocated_bytes(self) -> int:
        """Memory of the blocks. A CPU commits of it what has been written."""
        return 0 if self._storage is None else self._storage.numel() * self._storage.element_size()

    def open_pool(self, positions: int, rows: int) -> BlockPool:
        """A pool for `rows` rows of up to `positions` positions, or as many blocks as there is memory for.

        The earlier one, with the contents that it knows, if it has as many blocks and the weights are unchanged.
        """
        size = self.block_size
        blocks = min(self.memory_bytes // (size * self.bytes_per_token), 1 + rows * -(-positions // size))
        if self.pool is None or (self.pool.blocks, self.pool.size) != (blocks, size):
            self.pool = self._storage = None  # before the new one is made
            shape = (2, len(self.model.attentions), blocks, size, self.kv_heads, self.head_size)
            self._storage = _zeros(shape, self.model.dtype, self.model.device)
            self.pool = BlockPool(blocks, size)
        weights = [(weight.data_ptr(), weight._version) for weight in self.model.language_model.parameters()]
        if weights != self._weights:
            self.pool.forget()
            self._weights = weights
        return self.pool

    def blocks_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [blocks, positions, kv_heads, d]."""
        assert self._storage is not None
        return self._storage[0, layer], self._storage[1, layer]

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same by position, each [blocks * positions, kv_heads, d]."""
        keys, values = self.blocks_of(layer)
        return keys.flatten(0, 1), values.flatten(0, 1)

    def copy(self, copy: Copy) -> None:
        """Carry it out in all layers."""
        assert self._storage is not None
        self._storage[:, :, copy.target, : copy.positions] = self._storage[:, :, copy.source, : copy.positions]

    def slots(self, row: Row, begin: int, end: int) -> NDArray[np.int64]:
        """int64 [end - begin], where a row's positions stand in `slots_of`."""
        positions = np.arange(begin, end)
        return row.table[positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size

    @contextmanager
    def prefilling(self, plan: Prefill) -> Iterator[None]:
        """While it lasts, attention is that of the plan."""
        with self._planned(plan):
            yield

    @contextmanager
    def decoding(self, lengths: Tensor, tables: Tensor, runs: BlockRuns | None) -> Iterator[None]:
        """While it lasts, the batch is one token of each row, which sees the row's earlier ones; see `Step`."""
        size = self.block_size
        blocks = tables.gather(1, (lengths // size).unsqueeze(1)).squeeze(1).long()
        with self._planned(Step(lengths, tables, blocks * size + lengths % size, runs)):
            yield

    def runs(self, tables: Sequence[NDArray[np.int32]], lengths: NDArray[np.int64]) -> BlockRuns | None:
        """On a CPU, how a step reads the rows' blocks."""
        if self.model.device.type != "cpu":
            return None
        return BlockRuns(tables, lengths, self.block_size, self.model.dtype)

    @contextmanager
    def _planned(self, plan: Prefill | Step) -> Iterator[None]:
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever lay there: a masked NaN is still NaN. On a CPU pages are committed when they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    untouched = np.zeros(size + _ALIGNMENT, dtype=np.uint8)  # by calloc; torch.zeros writes
    begin = -untouched.ctypes.data % _ALIGNMENT
    return torch.from_numpy(untouched[begin : begin + size]).view(dtype).view(shape)


def _flash_attention(model: ServedModel) -> Any:
    """flash-attn's kernel for caches with a length per row, where it is installed and serves the model."""
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache

"""The forward pass of a decode step: one token of every running sequence in, this rank's logits out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.inference.block_runs import BlockRuns
from megatron_idft.inference.blocks import NOBODYS, Row
from megatron_idft.inference.cache import KeyValueCache
from megatron_idft.inference.captured_collectives import require_unregistered_graphs
from megatron_idft.inference.packed_weights import PackedWeights
from megatron_idft.inference.served import ServedModel

_KEPT_GRAPHS = 32  # the captured shapes that were used last


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor]
    logits: Tensor


class DecodeForward:
    """graphs: whether steps are captured as CUDA graphs, each shape when it first occurs.

    Shapes are rounded up to powers of two, so that few occur: rows beyond those given are computed in vain, and write
    into the block that nobody holds.
    """

    def __init__(self, model: ServedModel, cache: KeyValueCache) -> None:
        self.model, self.cache, self.packed = model, cache, PackedWeights(model)
        # The dispatchers of experts read token counts on the host, which cannot be captured.
        self.graphs = model.device.type == "cuda" and not model.has_experts
        if self.graphs and model.tp_group.size() > 1:
            require_unregistered_graphs()
        # Of all graphs: what one computes in between may lie where another does. They never run at the same time, and
        # what each leaves behind, its logits, is read before the next replay.
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        # By the address of the keys, rows, and blocks of a row.
        self._captured: OrderedDict[tuple[int, int, int], _Graph] = OrderedDict()

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """[rows, V/tp] logits for the rows' last tokens, whose keys and values it writes.

        With graphs the result is overwritten by the next call.
        """
        lengths = np.array([row.length for row in rows])
        blocks = int(lengths.max()) // self.cache.block_size + 1
        if self.graphs:
            inputs = self._inputs(rows, _power_of_two(len(rows)), _power_of_two(blocks))
            return self._replay(inputs)[: len(rows)]
        runs = self.cache.runs([row.table for row in rows], lengths)
        return self._run(*self._inputs(rows, len(rows), blocks), runs)

    def close(self) -> None:
        self._captured.clear()
        self.packed.close()

    def _inputs(self, rows: Sequence[Row], count: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and lengths int64 [count], tables int32 [count, blocks]."""
        tokens, lengths = np.zeros((2, count), dtype=np.int64)
        tables = np.full((count, blocks), NOBODYS, dtype=np.int32)
        for number, row in enumerate(rows):
            tokens[number] = row.drawn[-1] if row.drawn else row.prompt[-1]
            lengths[number] = row.length
            tables[number, : len(row.blocks)] = row.table
        return self._tensor(tokens), self._tensor(lengths), self._tensor(tables)

    def _run(self, tokens: Tensor, lengths: Tensor, tables: Tensor, runs: BlockRuns | None = None) -> Tensor:
        with self.cache.decoding(lengths, tables, runs), self.packed.used(len(tokens)):
            states = self.model.hidden_states(tokens.unsqueeze(1), lengths.unsqueeze(1))  # [1, rows, h]
            return self.model.logits(states)[0]

    def _tensor(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _replay(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shape = self.cache.blocks_of(0)[0].data_ptr(), *inputs[2].shape
        if shape not in self._captured:
            self._captured[shape] = self._capture(inputs)
            if len(self._captured) > _KEPT_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(shape)
        graph = self._captured[shape]
        for kept, given in zip(graph.inputs, inputs, strict=True):
            kept.copy_(given)
        graph.graph.replay()
        return graph.logits

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> _Graph:
        """The graph reads tokens, lengths and tables where they are now; replays copy others there."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and allocates what they keep, outside of the graph
            self._run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(*inputs)
        return _Graph(graph, inputs, logits)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

"""The forward pass of a decode step: one token of every running sequence in, this rank's logits out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.inference.cache import Bank, BankStep, KeyValueCache
from megatron_idft.inference.captured_collectives import require_unregistered_graphs
from megatron_idft.inference.packed_weights import PackedWeights
from megatron_idft.inference.served import ServedModel

_KEPT_GRAPHS = 32  # the captured shapes that were used last


@dataclass(frozen=True, slots=True)
class _Shape:
    """The shapes of a captured graph. banks: of each (address of its keys, slots, capacity, rows, positions read)."""

    banks: tuple[tuple[int, int, int, int, int], ...]


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    lengths: Tensor
    logits: Tensor


class DecodeForward:
    """graphs: whether steps are captured as CUDA graphs, each shape when it first occurs.

    Shapes are rounded up to powers of two, so that few occur: a bank's rows beyond its sequences are computed in vain
    and write into slots that nobody holds.
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
        self._captured: OrderedDict[_Shape, _Graph] = OrderedDict()

    def __call__(self, banks: Sequence[Bank]) -> Tensor:
        """[rows, V/tp] logits for the tokens that the banks' sequences are fed now, in the order of banks and slots.

        With graphs the result is overwritten by the next call.
        """
        banks = [bank for bank in banks if bank.active]
        if not self.graphs:
            steps, tokens, lengths = self._inputs([(bank, bank.active, bank.read_length()) for bank in banks])
            return self._run(steps, tokens, lengths)
        return self._replay(banks)

    def close(self) -> None:
        self._captured.clear()
        self.packed.close()

    def _inputs(self, parts: Sequence[tuple[Bank, int, int]]) -> tuple[list[BankStep], Tensor, Tensor]:
        """Rows of (bank, rows, positions read)."""
        tokens = self._tensor(np.concatenate([bank.tokens[:rows] for bank, rows, _ in parts]))
        lengths = self._tensor(np.concatenate([bank.lengths[:rows] for bank, rows, _ in parts]))
        steps, begin = [], 0
        for bank, rows, read in parts:
            steps.append(BankStep(bank, begin, lengths[begin : begin + rows], read))
            begin += rows
        return steps, tokens, lengths

    def _run(self, steps: list[BankStep], tokens: Tensor, lengths: Tensor) -> Tensor:
        with self.cache.decoding(steps), self.packed.used(len(tokens)):
            states = self.model.hidden_states(tokens.unsqueeze(1), lengths.unsqueeze(1))  # [1, rows, h]
            return self.model.logits(states)[0]

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _replay(self, banks: Sequence[Bank]) -> Tensor:
        parts = [(bank, min(_power_of_two(bank.active), bank.slots), self._read(bank)) for bank in banks]
        for bank, rows, _ in parts:
            bank.lengths[bank.active : rows] = 0  # rows without a sequence write there
        shape = _Shape(tuple((bank.keys.data_ptr(), bank.slots, bank.capacity, *rest) for bank, *rest in parts))
        steps, tokens, lengths = self._inputs(parts)
        if shape not in self._captured:
            self._captured[shape] = self._capture(steps, tokens, lengths)
            if len(self._captured) > _KEPT_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(shape)
        graph = self._captured[shape]
        graph.tokens.copy_(tokens)
        graph.lengths.copy_(lengths)
        graph.graph.replay()
        active = [
            i for step, bank in zip(steps, banks, strict=True) for i in range(step.begin, step.begin + bank.active)
        ]
        if len(active) == len(tokens):
            return graph.logits
        return graph.logits[self._tensor(np.array(active))]

    def _read(self, bank: Bank) -> int:
        if self.cache.flash_attention is not None:  # it reads what there is
            return bank.capacity
        return min(_power_of_two(bank.read_length()), bank.capacity)

    def _capture(self, steps: list[BankStep], tokens: Tensor, lengths: Tensor) -> _Graph:
        """Steps whose lengths are views of `lengths`: replays read what is copied there."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and allocates what they keep, outside of the graph
            self._run(steps, tokens, lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(steps, tokens, lengths)
        return _Graph(graph, tokens, lengths, logits)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

"""Tensor-parallel groups of any size in one process, for measuring one rank's share of the work on one device.

The process plays rank 0. The other ranks hold nothing: their shards are columns of -inf. So

    all-reduce   (MAX or SUM) leaves rank 0's tensor as it is and costs nothing on the device,
    all-gather   copies rank 0's tensor into slot 0 and fills the other slots with the state of an empty shard, which
                 each loss defines for itself (`set_empty_state`); on the device that is a copy of the size that a real
                 all-gather writes,

and a loss over the group must equal the same loss over rank 0's columns alone. Neither costs what the real collective's
latency does. Collectives are therefore counted: calls, and the bytes that a rank sends when the ranks form a ring.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

LARGEST_SIZE = 8


class EmulatedGroup(dist.ProcessGroup):
    """One process's view of a group. `calls` and `bytes_sent` count since `reset`."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._empty_state = torch.zeros(())
        self.reset()

    def reset(self) -> None:
        self.calls: list[str] = []
        self.bytes_sent = 0.0

    def set_empty_state(self, state: Tensor) -> None:
        """[S], or [] for any S: what an all-gather of [..., S] brings from a rank whose shard is empty."""
        self._empty_state = state

    def _count(self, name: str, tensor: Tensor, rounds: int) -> dist.Work:
        self.calls.append(name)
        self.bytes_sent += rounds * (self.size() - 1) / self.size() * tensor.numel() * tensor.element_size()
        return _Done()

    # The names below are those that torch.distributed's functions call.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._count("all_reduce", tensors[0], 2)

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        slots = output.view(self.size(), *tensor.shape)
        slots[0].copy_(tensor)
        slots[1:].copy_(self._empty_state)
        return self._count("all_gather", output, 1)

    all_gather_single = _allgather_base  # its name in torch 2.15

    def getBackendName(self) -> str:
        return "emulated"


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True


def emulated_groups() -> dict[int, EmulatedGroup]:
    """Size -> group. Makes this process rank 0 of an emulated world."""
    create = lambda _store, rank, size, _timeout: EmulatedGroup(rank, size)  # noqa: E731
    dist.Backend.register_backend("emulated", create, devices=["cpu", "cuda"])
    dist.init_process_group("emulated", rank=0, world_size=LARGEST_SIZE, store=FakeStore())
    return {size: dist.new_group(list(range(size)), backend="emulated") for size in (1, 2, 4, 8)}

"""One rank does something and the others get it, or wait for it.

Collectives end after their time limit. Work that may take hours waits on the store instead, which has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from megatron_idft.console import say
from megatron_idft.errors import UserError

_FOREVER = timedelta(days=7)


def build_once(name: str, build: Callable[[bool], object]) -> None:
    """Call `build(progress)` on rank 0, then on the first rank of each node, which finds it made on a shared disk.

    Args:
        name: of this build; unique in the process's life.
        build: must be idempotent. progress: whether to show it.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    name = f"megatron-idft/{name}"
    node = os.environ.get("GROUP_RANK", "0")
    if torch.distributed.get_rank() == 0:
        build(True)
        store.set(f"{name}/rank0", "done")
    store.wait([f"{name}/rank0"], _FOREVER)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        build(False)
        store.set(f"{name}/node{node}", "done")
    store.wait([f"{name}/node{node}"], _FOREVER)


def on_rank_0(name: str, work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait, however long it takes.

    Args:
        name: of this work; unique in the process's life.

    Raises:
        whatever `work` raises on rank 0; UserError on the others.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"megatron-idft/{name}"
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            store.set(key, f"failed: {error}")
            raise
        store.set(key, "done")
    else:
        store.wait([key], _FOREVER)
        outcome = store.get(key).decode()
        if outcome != "done":
            raise UserError(f"rank 0 {outcome}")
    torch.distributed.barrier()  # rank 0 may serve the store: it must not leave before all have read it


def print_on_rank_0(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        say(text)


def reduced(value: int, operation: Any) -> int:
    """One all-reduce of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, operation)
    return int(total)


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return every


def from_rank_0[T](work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, on every rank; its error ends every rank, and rank 0 reports it."""
    outcome: list[Any] = [None, None]
    failed: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failed, outcome[1] = error, str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise UserError(f"rank 0: {outcome[1]}")
    result: T = outcome[0]
    return result

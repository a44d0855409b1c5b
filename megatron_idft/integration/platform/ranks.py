"""Something that one process per file system builds while the others wait, such as a token cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta


def build_once(name: str, build: Callable[[bool], object]) -> None:
    """Call `build(progress)` on rank 0, then on the first rank of each node, which finds it made on a shared disk.

    The waiting is on the store, not in a collective: no collective's timeout limits how long building may take.

    Args:
        name: of this build; unique in the process's life.
        build: must be idempotent. progress: whether to show it.
    """
    import torch

    store = torch.distributed.distributed_c10d._get_default_store()
    name = f"megatron-idft/{name}"
    node, forever = os.environ.get("GROUP_RANK", "0"), timedelta(days=7)
    if torch.distributed.get_rank() == 0:
        build(True)
        store.set(f"{name}/rank0", "done")
    store.wait([f"{name}/rank0"], forever)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        build(False)
        store.set(f"{name}/node{node}", "done")
    store.wait([f"{name}/node{node}"], forever)

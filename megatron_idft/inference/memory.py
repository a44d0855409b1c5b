"""How much memory keys and values may take."""

import os

import psutil
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_SHARE_OF_DEVICE = 0.8  # of what is free: activations of prefills and the logits need the rest
_SHARE_OF_HOST = 0.4  # of what is available, divided among the processes of this machine


def memory_for_cache(asked: int | None, device: torch.device, tp_group: ProcessGroup) -> int:
    """Bytes on this rank, the same on all ranks of `tp_group`: what was asked for, or a share of what is free.

    Collectives: one all-reduce over `tp_group`.
    """
    found: Tensor = torch.tensor([_free(device) if asked is None else asked], dtype=torch.int64, device=device)
    if tp_group.size() > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN, group=tp_group)
    return int(found)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _SHARE_OF_DEVICE)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * _SHARE_OF_HOST / processes)

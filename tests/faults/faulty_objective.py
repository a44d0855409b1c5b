"""An objective with faults on order, `--sft-loss faulty_objective:faulty`: real ones, at a step that the test chooses.

Orders are files in the folder $FAULTS, named by iteration (from 1) and rank:

- `stop-ITERATION-RANK`: write `stopped-ITERATION-RANK` with the process's id and wait, to be killed, until the order
  is withdrawn;
- `nan-ITERATION-RANK`: NaN weights, once if it says so;
- `file-limit-from-ITERATION`: the largest file that any rank may write from then on, in bytes.
"""

import os
import resource
import time
from pathlib import Path

import torch


def faulty(statistics) -> torch.Tensor:
    """The weight p, with what is ordered for this iteration."""
    from megatron.training import get_args

    weight = statistics.log_prob.exp()
    folder = Path(os.environ["FAULTS"])
    at = f"{get_args().curr_iteration + 1}-{torch.distributed.get_rank()}"
    limit = folder / f"file-limit-from-{get_args().curr_iteration + 1}"
    if limit.exists():
        most = int(limit.read_text())
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    wait_at(at)
    nan = folder / f"nan-{at}"
    if nan.exists():
        if nan.read_text() == "once":
            nan.unlink()
        return weight * torch.nan
    return weight


def wait_at(place: str) -> None:
    """Write `stopped-PLACE` where `stop-PLACE` is ordered, and wait until that is withdrawn."""
    folder = Path(os.environ["FAULTS"])
    stop = folder / f"stop-{place}"
    if stop.exists():
        (folder / f"stopped-{place}.new").write_text(str(os.getpid()))
        (folder / f"stopped-{place}.new").rename(folder / f"stopped-{place}")
        while stop.exists():
            time.sleep(0.02)

"""How many ranks there are: one process without torchrun is enough for world size 1."""

from __future__ import annotations

import os

from megatron_idft.errors import LaunchError

_RANKS = ("RANK", "WORLD_SIZE")
# Variables by which other launchers than torchrun say how many processes they have started.
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def be_one_process(program: str) -> bool:
    """Give this process the environment of the only rank, unless a launcher has given it one; whether it was given.

    Raises:
        LaunchError: several processes without ranks, or ranks without a place to meet.
    """
    if any(name in os.environ for name in _RANKS):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise LaunchError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR or MASTER_PORT is not set: start the ranks"
                " with torchrun, or set both, the same on all ranks"
            )
        _set_missing()
        return False
    for name, launcher in _OTHER_LAUNCHERS.items():
        if program.endswith(("train", ".py")) and int(os.environ.get(name, "1")) > 1:
            raise LaunchError(
                f"{launcher} has started {os.environ[name]} processes that do not know of each other: start a torchrun"
                " on each node (launch/slurm_train.sh does), or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and"
                f" MASTER_PORT. For a single process unset {name}"
            )
    _set_missing()
    return True


def _set_missing() -> None:
    """Port 0: the operating system chooses a free one when the store of the only rank is made."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)

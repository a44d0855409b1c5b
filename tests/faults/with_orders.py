"""`-m tests.faults.with_orders FOLDER train …`: `megatron_idft` in a forked rank, with faults that FOLDER orders."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_idft.cli import main
from tests.launch import ROOT


def waiting(function: Callable, place: Callable[..., str]) -> Callable:
    """`function`, waiting before it where it is ordered to: at evaluation-STEP-RANK, save-ITERATION-RANK, load-RANK."""

    @functools.wraps(function)  # callers are asked for by its parameters' names
    def ordered(*args: Any, **kwargs: Any) -> Any:
        from faulty_objective import wait_at

        wait_at(place(*args, **kwargs))
        return function(*args, **kwargs)

    return ordered


def count_evaluation_steps() -> str:
    global evaluation_steps
    evaluation_steps += 1
    return f"evaluation-{evaluation_steps}-{os.environ['RANK']}"


evaluation_steps = 0

if __name__ == "__main__":
    os.environ["FAULTS"] = sys.argv[1]
    sys.path.insert(0, str(ROOT / "tests" / "faults"))
    from megatron.core import dist_checkpointing
    from megatron.training import ft_integration

    ft_integration.on_eval_step_start = waiting(ft_integration.on_eval_step_start, count_evaluation_steps)
    dist_checkpointing.save = waiting(
        dist_checkpointing.save,
        lambda state, folder, *_, **__: f"save-{int(str(folder).rsplit('iter_')[-1])}-{os.environ['RANK']}",
    )
    dist_checkpointing.load = waiting(dist_checkpointing.load, lambda *_, **__: f"load-{os.environ['RANK']}")
    sys.exit(main(sys.argv[2:]))

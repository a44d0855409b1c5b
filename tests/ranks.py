"""Run a function on several gloo ranks: `run_ranks(function, world_size, *args)` returns each rank's result."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# Children fork from a server that has imported torch once: a rank starts in milliseconds instead of seconds. A dispatch
# mode imports torch._dynamo, again for seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "torch._dynamo"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` in `world_size` fresh processes with the default process group (gloo, CPU) initialised.

    Args:
        function: defined at the top level of a module that a new process can import.
        args: pickled to every rank.
        timeout: seconds until a collective, or the whole call, is given up.

    Returns:
        what each rank returned, in rank order.

    Raises:
        AssertionError: a rank raised (its traceback follows), died, or was late; all ranks are stopped first.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(
                target=_rank_main, args=(function, rank, world_size, Path(folder), timeout, args), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _join(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not failures, "\n".join(failures)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes of the ranks {codes}; negative: killed, here after {timeout} s"
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _join(processes: list[Any], deadline: float) -> None:
    """Wait for all ranks, until one fails: the others would wait for it in a collective."""
    running = list(processes)
    while running and all(process.exitcode in (None, 0) for process in processes):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        wait([process.sentinel for process in running], left)
        running = [process for process in running if process.is_alive()]


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: Path, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*args), folder / f"{rank}.result")
        torch.distributed.barrier()  # nobody leaves while a peer still talks to it
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None

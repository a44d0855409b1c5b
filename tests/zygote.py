"""Forks ranks out of a process that has Megatron imported already: a launch then costs seconds less per rank.

Started by launch.py. Reads one request per line, {"argv", "nproc", "cwd", "output", "alone"}, runs it as torchrun would
on one machine (alone: as one process without torchrun), stops all ranks when one fails, and answers with the exit
codes. What a fresh process sees (the order of imports, sys.path) is not under test here: test_run.py and test_train.py
start fresh ones.
"""

import atexit
import contextlib
import json
import os
import queue
import runpy
import signal
import sys
import traceback

from launch import free_port
from megatron_idft.integration import cpu
from megatron_idft.integration.signals import INTERRUPTED, STOPPED, die_with_parent

cpu.enable()

# What nearly every rank needs, and would spend most of its short life on importing.
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.models.hybrid.hybrid_model  # noqa: E402
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch._inductor.utils  # noqa: E402
import torch.onnx  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

# Upstream starts a manager process, which imports torch anew, for a queue that only --async-save shares.
filesystem_async._results_queue = queue.Queue()


def run_rank(request: dict, rank: int, port: int) -> int:
    os.setsid()  # as torchrun does: a signal to this group reaches what the rank forks, and nobody else
    die_with_parent()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["nproc"], "LOCAL_WORLD_SIZE": request["nproc"]}
    if not request["alone"]:
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    argv = request["argv"]
    module = argv[1] if argv[0] == "-m" else None
    sys.argv = argv[1:] if module else argv
    sys.path.insert(0, request["cwd"] if module else os.path.dirname(argv[0]))
    code = 0
    try:
        runpy.run_module(module, run_name="__main__") if module else runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run(request: dict) -> list[int]:
    port = free_port()
    ranks: dict[int, int] = {}
    for rank in range(request["nproc"]):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(request, rank, port))
        ranks[pid] = rank
    codes = [0] * request["nproc"]
    running = set(ranks)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]] not in (0, STOPPED, INTERRUPTED):  # ranks that are told to stop do so together
            for other in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)

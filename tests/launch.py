"""Start real processes, failing with the tail of their output.

`torchrun` starts fresh ones under torch.distributed.run, as a user does. `forked` forks them out of a process that has
imported Megatron already, for the many runs whose subject is not the start.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAIL = 12000


def torchrun(
    args: Sequence[str | Path],
    nproc: int = 1,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """Run `python -m torch.distributed.run --nproc-per-node NPROC ARGS…` and return stdout and stderr together.

    `env` is added to this process's environment. Raises AssertionError with the output's tail if the command fails or
    does not end within `timeout` seconds (all its processes are then stopped).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [str(arg) for arg in args]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **(env or {})}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=merged,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s: {command}\n{output[-TAIL:]}") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    assert process.returncode == 0, f"exit code {process.returncode}: {command}\n{output[-TAIL:]}"
    return output


_ports = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """A port for a rendezvous. Below the range from which connections take theirs: one of those could get it first."""
    for number in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 20000 + number % 10000))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError


_zygote: subprocess.Popen[str] | None = None


def forked(args: Sequence[str | Path], nproc: int = 1, timeout: float = 300) -> str:
    """Like `torchrun`, with ranks forked out of an imported Megatron in CPU mode (zygote.py)."""
    codes, text = forked_codes(args, nproc, timeout)
    assert not any(codes), f"exit codes {codes}: {args}\n{text[-TAIL:]}"
    return text


def forked_codes(
    args: Sequence[str | Path], nproc: int = 1, timeout: float = 300, alone: bool = False
) -> tuple[list[int], str]:
    """(exit codes of the ranks, their output), whatever they are. alone: one process, without torchrun's variables."""
    global _zygote
    if _zygote is None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        _zygote = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONWARNINGS": "ignore",
            },
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(_stop_zygote)
    assert _zygote.stdin is not None and _zygote.stdout is not None
    argv = [str(arg) for arg in args]
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"argv": argv, "nproc": nproc, "cwd": str(ROOT), "output": output.name, "alone": alone}
        _zygote.stdin.write(json.dumps(request) + "\n")
        _zygote.stdin.flush()
        ready, _, _ = select.select([_zygote.stdout], [], [], timeout)
        answer = _zygote.stdout.readline() if ready else ""
        text = output.read()
    if not answer:
        _stop_zygote()
        raise AssertionError(f"not done after {timeout} s: {argv}\n{text[-TAIL:]}")
    return json.loads(answer), text


def _stop_zygote() -> None:
    global _zygote
    if _zygote is not None:
        os.killpg(_zygote.pid, signal.SIGKILL)
        _zygote.wait()
        _zygote = None

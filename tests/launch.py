"""Start real processes, failing with the tail of their output.

`torchrun` starts fresh ones under torch.distributed.run, as a user does. For the many runs whose subject is not the
start, processes that have imported everything (zygote.py) fork instead: `forked` ranks by themselves, and
`forking_python` whatever scripts and programs start with it, torchrun and its ranks too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from megatron_idft.integration.platform.signals import INTERRUPTED, STOPPED
from tests import forking_client

ROOT = Path(__file__).resolve().parent.parent
TAIL = 12000


def torchrun(
    args: Sequence[str | Path],
    nproc: int = 1,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    python: str = sys.executable,
) -> str:
    """Run `python -m torch.distributed.run --nproc-per-node NPROC ARGS…` and return stdout and stderr together.

    `env` is added to this process's environment. Raises AssertionError with the output's tail if the command fails or
    does not end within `timeout` seconds (all its processes are then stopped).
    """
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return _output([*command, *args], cwd, env or {}, timeout)


def started(args: Sequence[str | Path], cwd: Path | str = ROOT, timeout: float = 300) -> str:
    """Like `torchrun` with one rank, and without an agent, which costs an import of torch more."""
    return _output([sys.executable, *args], cwd, _variables(0, 1, free_port()), timeout)


def _output(words: Sequence[str | Path], cwd: Path | str, env: Mapping[str, str], timeout: float) -> str:
    command = [str(word) for word in words]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **env}
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


def forked(args: Sequence[str | Path], nproc: int = 1, timeout: float = 300) -> str:
    """Like `torchrun`, with ranks forked out of an imported Megatron in CPU mode, and without an agent."""
    codes, text = forked_codes(args, nproc, timeout)
    assert not any(codes), f"exit codes {codes}: {args}\n{text[-TAIL:]}"
    return text


def forked_codes(
    args: Sequence[str | Path], nproc: int = 1, timeout: float = 300, alone: bool = False
) -> tuple[list[int], str]:
    """(exit codes of the ranks, their output), whatever they are. alone: one process, without torchrun's variables.

    When one fails, the others have a second to say why by themselves, as under torchrun, and are then killed; but for
    one that was told to stop: they do so together.
    """
    server = servers()["megatron"]
    argv, port = [str(arg) for arg in args], free_port()
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), "PYTHONWARNINGS": "ignore"}
    with tempfile.NamedTemporaryFile("r") as output, open(output.name, "ab") as file, open(os.devnull) as nothing:
        streams = (nothing.fileno(), file.fileno(), file.fileno())
        ranks: dict[socket.socket, int] = {}
        for rank in range(nproc):
            own = {} if alone else _variables(rank, nproc, port)
            ranks[forking_client.ask(server, argv, common | own, str(ROOT), streams, sys.executable)] = rank
        codes, running, deadline = [0] * nproc, list(ranks), time.monotonic() + timeout
        killed_at = math.inf
        while running:
            ended, _, _ = select.select(running, [], [], max(min(deadline, killed_at) - time.monotonic(), 0))
            if not ended and killed_at < deadline:
                killed_at = math.inf
                for connection in running:
                    with contextlib.suppress(OSError):
                        connection.send(bytes([signal.SIGKILL]))
            elif not ended:
                for connection in running:
                    connection.close()  # kills the rank
                raise AssertionError(f"not done after {timeout} s: {argv}\n{output.read()[-TAIL:]}")
            for connection in ended:
                code = codes[ranks[connection]] = forking_client.status(connection)
                running.remove(connection)
                connection.close()
                if code not in (0, STOPPED, INTERRUPTED):
                    killed_at = min(killed_at, time.monotonic() + 1)
        return codes, output.read()


def start(args: Sequence[str | Path], stdout: IO[bytes] | int, stderr: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """A launch of one forked rank, which the test watches, and stops."""
    command = [forking_python(), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=_one_rank(), stdout=stdout, stderr=stderr)


def start_on_a_terminal(args: Sequence[str | Path], shown: IO[bytes]) -> subprocess.Popen[bytes]:
    """The same on a terminal of 30 lines and 200 columns, where progress is a bar."""
    command = shlex.join([forking_python(), *map(str, args)])
    words = ["script", "-qec", f"stty rows 30 cols 200; {command}", "/dev/null"]
    return subprocess.Popen(words, cwd=ROOT, env=_one_rank(), stdin=subprocess.DEVNULL, stdout=shown)


def _one_rank() -> dict[str, str]:
    variables = _variables(0, 1, free_port())
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), **variables}


def _variables(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Those of torchrun that Megatron reads."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "GROUP_RANK": 0}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@functools.cache
def forking_python() -> str:
    """An executable for PYTHON=…: programs, torchrun and its ranks start in hundredths of a second (forking_client.py).

    What it has not imported for them is this package: they do, but for the verbs with a model, from this checkout.
    """
    path = Path(servers()["python"]).with_name("forking-python")
    interpreted = os.environ.get("TRITON_INTERPRET", "0")
    called = f"main({sys.executable!r}, {servers()!r}, {str(ROOT)!r}, {interpreted!r})"
    lines = [f"#!{sys._base_executable} -IS", "import sys", f"sys.path.append({str(ROOT / 'tests')!r})"]  # type: ignore[attr-defined]
    path.write_text("\n".join([*lines, "import forking_client", f"forking_client.{called}", ""]))
    path.chmod(0o755)
    return str(path)


@functools.cache
def servers() -> dict[str, str]:
    """The sockets of this process's zygotes, by name; they end with it."""
    folder = tempfile.TemporaryDirectory(prefix="zygote-")
    sockets = {name: str(Path(folder.name) / name) for name in ("python", "megatron")}
    zygote = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "tests" / "zygote.py"), *sockets.values()],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": _python_path(),
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # what forks must have one thread
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    atexit.register(folder.cleanup)
    atexit.register(zygote.kill)
    assert zygote.stdout is not None and zygote.stdout.readline(), "zygote.py has not started"
    return sockets


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])

"""Start real processes: `torchrun(...)` runs a script under torch.distributed.run, failing with its output's tail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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

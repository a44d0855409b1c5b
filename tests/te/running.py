"""Starts programs in the environment of Transformer Engine."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.launch import ROOT, TAIL, _variables, free_port

PYTHON = Path(os.environ.get("TRANSFORMER_ENGINE_PYTHON") or ROOT / ".cache" / "transformer-engine" / "bin" / "python")


class Machine:
    """machine.py in a process: it imports Transformer Engine and Megatron once, and forks for each program."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        # Without bytecode the imports take most of the time; environment.sh and some machines leave none.
        environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(PYTHON.parent.parent / "bytecode")}
        self._process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("machine.py")],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        if self._line(300) != "ready\n":
            self.close()
            raise AssertionError(f"machine.py has not started:\n{self._process.communicate()[1][-TAIL:]}")

    def run(self, args: Sequence[str | Path], nproc: int = 1, timeout: float = 300) -> str:
        """Like `launch.forked`: the output of a program, run by so many ranks.

        Raises:
            AssertionError: a rank has failed, or it took longer than `timeout` seconds.
        """
        assert self._process.stdin is not None
        port, argv = free_port(), [str(arg) for arg in args]
        with tempfile.NamedTemporaryFile("r") as output:
            variables = [_variables(rank, nproc, port) for rank in range(nproc)]
            self._process.stdin.write(json.dumps({"argv": argv, "variables": variables, "output": output.name}) + "\n")
            self._process.stdin.flush()
            codes = json.loads(self._line(timeout) or "null")
            text = output.read()
        assert codes == [0] * nproc, f"exit codes {codes}: {argv}\n{text[-TAIL:]}"
        return text

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)

    def _line(self, timeout: float) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        return stdout.readline() if select.select([stdout], [], [], timeout)[0] else ""

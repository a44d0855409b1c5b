"""Processes that compare answers, each killed where it takes too long."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import Any

from megatron_idft.errors import WorkerError

START_SECONDS = 180.0  # sympy from a slow network file system
WORKER = "megatron_idft.corpus.verification.worker"


class _Worker:
    """One process in a session of its own, so that what it starts dies with it."""

    def __init__(self, settings: str, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self.ready = False
        self.task: int | None = None
        self.connection, theirs = Pipe()
        # As multiprocessing's spawn has it, but without importing the program's __main__: this may be a trainer's.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}  # each reserves memory
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, **threads},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, index: int, task: Any) -> None:
        self.task = index
        self.deadline = time.monotonic() + self.timeout_seconds
        self.connection.send_bytes(json.dumps(task).encode())

    def kill(self) -> str:
        """Kill it with all it started, and say how it ended, which may have been before."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        status = self.process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class WorkerPool:
    """Runs tasks in up to `workers` processes, started when first needed and used again.

    timeout_seconds: wall clock, for each task. memory_mb: address space of each process. plugin: `module:function`;
    None: math-verify. Not for several threads at once.
    """

    def __init__(self, *, plugin: str | None, workers: int, timeout_seconds: float, memory_mb: int):
        self.timeout_seconds = timeout_seconds
        self._count = workers
        self._tool = f"plug-in {plugin!r}" if plugin else "math-verify"
        self._settings = json.dumps({"plugin": plugin, "timeout_seconds": timeout_seconds, "memory_mb": memory_mb})
        self._workers: list[_Worker] = []
        self._process = os.getpid()
        weakref.finalize(self, _kill_all, self._workers, self._process)  # at the latest when Python exits

    def start(self) -> None:
        """Start one process now. Raises WorkerError, with the remedy, where what it needs cannot be loaded."""
        self.run([], at_least=1)

    def run(self, tasks: Sequence[Any], at_least: int = 0) -> list[dict[str, Any]]:
        """{"verdict", "reason"} of each task, in order; tasks are JSON: [response or answer, reference].

        A task that takes too long or ends its process is "unknown". Raises WorkerError where no process can be started.
        """
        if os.getpid() != self._process:  # a fork: the processes belong to the parent
            self._workers, self._process = [], os.getpid()
            weakref.finalize(self, _kill_all, self._workers, self._process)
        results: list[dict[str, Any]] = [{} for _ in tasks]
        pending = deque(range(len(tasks)))
        try:
            while True:
                for worker in [worker for worker in self._workers if worker.ready and worker.task is None]:
                    if pending:
                        self._send(worker, pending.popleft(), tasks, results)
                busy = sum(worker.task is not None for worker in self._workers)
                while len(self._workers) < min(self._count, max(len(pending) + busy, at_least)):
                    self._workers.append(_Worker(self._settings, self.timeout_seconds))
                starting = [worker for worker in self._workers if not worker.ready]
                if not pending and not busy and not (at_least and starting):
                    return results
                self._wait(results)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        _kill_all(self._workers, self._process)

    def _send(self, worker: _Worker, index: int, tasks: Sequence[Any], results: list[dict[str, Any]]) -> None:
        try:
            worker.send(index, tasks[index])
        except OSError:  # it died while idle
            self._crashed(worker, results)

    def _wait(self, results: list[dict[str, Any]]) -> None:
        """Until a process says something, or ends, or the time of one is over."""
        waiting = {w.connection: w for w in self._workers if w.task is not None or not w.ready}
        left = min(worker.deadline for worker in waiting.values()) - time.monotonic()
        said = wait(list(waiting), max(0.0, left))
        for connection, worker in waiting.items():
            if connection in said:
                self._receive(worker, results)
            elif time.monotonic() >= worker.deadline:
                self._remove(worker)
                if worker.task is None:
                    raise WorkerError(f"{self._tool}: not loaded after {START_SECONDS:g} s; look at the file system")
                reason = f"timed out after {self.timeout_seconds:g} s"
                results[worker.task] = {"verdict": "unknown", "reason": reason}

    def _receive(self, worker: _Worker, results: list[dict[str, Any]]) -> None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._crashed(worker, results)
            return
        if worker.task is not None:
            results[worker.task] = message
            worker.task = None
            if message.get("last"):
                self._remove(worker)
        elif "error" in message:
            raise WorkerError(f"{self._tool}: {message['error']}")
        worker.ready = True

    def _crashed(self, worker: _Worker, results: list[dict[str, Any]]) -> None:
        end = self._remove(worker)
        if not worker.ready:
            raise WorkerError(f"{self._tool}: its process ended while loading, {end}; more memory_mb may be needed")
        if worker.task is not None:
            results[worker.task] = {"verdict": "unknown", "reason": f"the verifying process ended, {end}"}

    def _remove(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.kill()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        while workers:
            workers.pop().kill()

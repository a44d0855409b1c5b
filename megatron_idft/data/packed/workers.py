"""Processes that encode blocks and place documents, fed by one that reads."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Self

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.worker_tokenizer import describe_tokenizer
from megatron_idft.errors import PrepareError, RecordError, TemplateError

WORKER = "megatron_idft.data.packed.worker"


def write_setup(path: Path, tokenizer: ChatTokenizer, settings: PrepareSettings, folder: Path) -> None:
    """What every process begins with. folder: of the chunks."""
    setup = {"tokenizer": describe_tokenizer(tokenizer), "settings": asdict(settings), "folder": str(folder)}
    path.write_text(json.dumps(setup), encoding="utf-8")


@dataclass(slots=True)
class Task:
    """header: JSON; `index` orders the tasks. label: what it is, for errors."""

    header: dict[str, Any]
    label: str
    payload: bytes = b""


class _Worker:
    def __init__(self, setup: Path):
        self.ready = False
        self.task: Task | None = None
        self.connection, theirs = Pipe()
        # As multiprocessing's spawn has it, but without importing the program's __main__.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(setup)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **threads},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        theirs.close()

    def send(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # it died; the connection's end says so at the next wait
            self.connection.send_bytes(json.dumps(task.header).encode())
            self.connection.send_bytes(task.payload)

    def kill(self) -> str:
        """Kill it, and say how it ended, which may have been before."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        status = self.process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class WorkerPool:
    """Up to `count` processes, started as tasks come and used again. setup: the file that they begin with.

    A process whose parent is gone finishes its task and ends.
    """

    def __init__(self, count: int, setup: Path):
        self._count, self._setup = count, setup
        self._workers: list[_Worker] = []

    def run(self, tasks: Iterator[Task]) -> Iterator[dict[str, Any]]:
        """The replies, as they come. A process holds one task; tasks are taken from the iterator as they are needed.

        Where tasks fail, those before the first that failed are finished, and its error is raised: the same one
        whatever the number of processes. Raises PrepareError where a process dies.
        """
        waiting: deque[Task] = deque()
        failed: dict[str, Any] | None = None
        more = True
        while True:
            while more and failed is None and len(waiting) < self._free():
                task = next(tasks, None)
                if task is None:
                    more = False
                else:
                    waiting.append(task)
            if failed is not None:
                waiting = deque(task for task in waiting if task.header["index"] < failed["index"])
            for worker in self._workers:
                if waiting and worker.ready and worker.task is None:
                    worker.send(waiting.popleft())
            starting = sum(not worker.ready for worker in self._workers)
            for _ in range(min(len(waiting) - starting, self._count - len(self._workers))):
                self._workers.append(_Worker(self._setup))
            busy = [w for w in self._workers if w.task is not None or (waiting and not w.ready)]
            if not busy:
                if failed is not None:
                    raise _error(failed)
                if not more:
                    return
                continue
            connections: dict[Connection, _Worker] = {w.connection: w for w in self._workers}
            for connection in wait(list(connections)):
                worker = connections[connection]  # type: ignore[index]
                reply = self._receive(worker)
                if reply is None:
                    continue
                if "error" not in reply:
                    yield reply
                elif failed is None or reply["index"] < failed["index"]:
                    failed = reply

    def _free(self) -> int:
        """How many tasks could be under way besides those that are."""
        return self._count - sum(worker.task is not None for worker in self._workers)

    def _receive(self, worker: _Worker) -> dict[str, Any] | None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            task = worker.task
            self._workers.remove(worker)
            end = worker.kill()
            raise PrepareError(
                f"a worker process ended by itself ({end}) "
                + (f"on {task.label}" if task else "while starting")
                + "; if memory ran out, take fewer --workers. The same command goes on from there"
            ) from None
        if not worker.ready:
            worker.ready = True
            if "error" in message:
                raise _error(message)
            return None
        worker.task = None
        return dict(message)

    def close(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _error(reply: dict[str, Any]) -> Exception:
    kind, values = reply["error"], reply["values"]
    if kind == "record":
        return RecordError(**values)
    if kind == "template":
        return TemplateError(values["text"])
    if kind == "system":
        return PrepareError(f"{values['text']}; mend it and start the same command again: what is finished is kept")
    return RuntimeError(f"in a worker process:\n{values['text']}")

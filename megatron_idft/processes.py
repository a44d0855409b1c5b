"""Processes that can be killed: each does one task after the other, in a session of its own, and is replaced.

`ProcessPool` starts and feeds them; a module that they run ends in `serve(load)`. They import what this module needs,
never the program's __main__, which may be a trainer's. Tasks and replies are JSON, and nothing is unpickled.
"""

import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

START_SECONDS = 180.0  # for imports from a slow network file system
MAX_REASON, MAX_TRACEBACK = 500, 20_000  # characters
_LIBRARIES = ("OMP", "MKL", "OPENBLAS", "RAYON")  # each of their threads reserves memory
_PIPE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Failure:
    """Instead of a reply.

    Args:
        reason: in a line.
        end: how the process ended, where it did so by itself, and what it printed last.
        traceback: of the exception in the process, where there was one.
    """

    reason: str
    end: str | None = None
    traceback: str = ""


class Task(NamedTuple):
    """What a process gets.

    Attributes:
        number: for the giver of the task, as `label` is.
        header: JSON.
        payload: bytes as they are.
    """

    number: int
    header: Any
    payload: bytes = b""
    label: str = ""


class _Process:
    def __init__(self, module: str, settings: str, seconds: float):
        self.ready = False
        self.task: Task | None = None
        self.deadline = time.monotonic() + seconds
        self.connection, theirs = Pipe()
        watched, self._held = os.pipe()  # closes when this program ends, however that happens
        # As multiprocessing's spawn has it, but without importing the program's __main__.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        threads = {f"{library}_NUM_THREADS": "1" for library in _LIBRARIES} | {"TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(watched), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **threads},
            pass_fds=[theirs.fileno(), watched],
            start_new_session=True,  # Ctrl-C is the program's to handle, and what the process starts dies with it
        )
        theirs.close()
        os.close(watched)
        assert self.process.stderr is not None
        self.errors = self.process.stderr
        os.set_blocking(self.errors.fileno(), False)
        self.printing, self._printed = True, b""

    def send(self, task: Task, seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        with suppress(OSError):  # it died; the connection's end says so at the next wait
            self.connection.send_bytes(json.dumps(task.header).encode())
            self.connection.send_bytes(task.payload)

    def take_printed(self) -> None:
        """Keep the end of what it prints, and make room for more: a full pipe would stop it."""
        with suppress(BlockingIOError):
            new = os.read(self.errors.fileno(), _PIPE_BYTES)
            self.printing = bool(new)
            self._printed = (self._printed + new)[-_PIPE_BYTES:]

    def kill(self) -> str:
        """Kill it with all that it started, and say how it ended, which may have been before."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.take_printed()
        self.connection.close()
        self.errors.close()
        os.close(self._held)
        end = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = self._printed.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{end}, after it printed {last[:MAX_REASON]!r}" if last else end


class ProcessPool:
    """Up to `count` processes that run `module`, started as tasks come and used again. Not for several threads at once.

    Args:
        module: a module that ends in `serve(load)`.
        settings: JSON, for `load`.
        count: of processes.
        not_started: makes the error for a process that does not start.
        seconds: wall clock for a task, after which its process is killed; None: no limit, for loading neither.
        memory_mb: address space of each process; None: no limit.
    """

    def __init__(
        self,
        module: str,
        settings: Any,
        count: int,
        *,
        not_started: Callable[[Failure], Exception],
        seconds: float | None = None,
        memory_mb: int | None = None,
    ):
        self._module, self._count, self._not_started = module, count, not_started
        self._settings = json.dumps({"settings": settings, "memory_mb": memory_mb})
        self._seconds, self._start_seconds = (math.inf, math.inf) if seconds is None else (seconds, START_SECONDS)
        self._processes: list[_Process] = []
        self._own()

    def _own(self) -> None:
        self._owner = os.getpid()
        weakref.finalize(self, _kill_all, self._processes, self._owner)  # at the latest when Python exits

    def start(self) -> None:
        """Start one process now, and wait until it has loaded.

        Raises:
            Exception: made by `not_started`.
        """
        list(self.run((), at_least=1))

    def run(self, tasks: Iterable[Task], at_least: int = 0) -> Iterator[tuple[Task, Any]]:
        """Each task with its reply, or a Failure, as they come.

        Tasks are taken as processes can do them. Leaving this iterator early ends the processes.

        Args:
            tasks: in any number.
            at_least: processes that start even without tasks.

        Raises:
            Exception: made by `not_started`.
        """
        if os.getpid() != self._owner:  # a fork: the processes belong to the parent
            self._processes = []
            self._own()
        coming, waiting = iter(tasks), deque[Task]()
        try:
            while True:
                busy = sum(process.task is not None for process in self._processes)
                waiting.extend(islice(coming, self._count - busy - len(waiting)))
                for process in self._processes:
                    if waiting and process.ready and process.task is None:
                        process.send(waiting.popleft(), self._seconds)
                        busy += 1
                starting = [process for process in self._processes if not process.ready]
                wanted = max(len(waiting) - len(starting), at_least - len(self._processes))
                for _ in range(min(wanted, self._count - len(self._processes))):
                    starting.append(_Process(self._module, self._settings, self._start_seconds))
                    self._processes.append(starting[-1])
                if not busy and not waiting and not (at_least and starting):
                    return
                yield from self._replies()
        except BaseException:
            self.close()
            raise

    def _replies(self) -> list[tuple[Task, Any]]:
        """Those that have come when a process has said something, or ended, or the time of one was over."""
        left = min(process.deadline for process in self._processes) - time.monotonic()
        sources: list[Any] = [process.connection for process in self._processes]
        sources += [process.errors for process in self._processes if process.printing]
        said: list[Any] = wait(sources, None if left == math.inf else max(0.0, left))
        replies = []
        for process in list(self._processes):
            if process.errors in said:
                process.take_printed()
            task = process.task
            if process.connection in said:
                reply = self._receive(process)
            elif time.monotonic() >= process.deadline:
                reply = self._timed_out(process)
            else:
                continue
            if task is not None:
                replies.append((task, reply))
            elif not process.ready and isinstance(reply, Failure):
                raise self._not_started(reply)
            process.ready = True
        return replies

    def _receive(self, process: _Process) -> Any:
        try:
            message = json.loads(process.connection.recv_bytes())
        except (EOFError, OSError):
            end = self._remove(process)
            return Failure(f"its process ended{'' if process.ready else ' while loading'}, {end}", end)
        process.task, process.deadline = None, math.inf
        if message.get("last"):
            self._remove(process)
        return Failure(**message["failure"]) if "failure" in message else message["reply"]

    def _timed_out(self, process: _Process) -> Failure:
        self._remove(process)
        if process.ready:
            return Failure(f"timed out after {self._seconds:g} s")
        return Failure(f"not loaded after {self._start_seconds:g} s; look at the file system")

    def _remove(self, process: _Process) -> str:
        self._processes.remove(process)
        return process.kill()

    def close(self) -> None:
        """End the processes; `run` would start new ones."""
        _kill_all(self._processes, self._owner)


def _kill_all(processes: list[_Process], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        while processes:
            processes.pop().kill()


def serve(load: Callable[[Any], Callable[[Any, bytes], Any]]) -> None:
    """The life of a process that a pool has started: `python -P -m MODULE FD WATCHED SETTINGS`, never by hand.

    Args:
        load: takes the pool's settings and returns a function from the header and the payload of a task to the reply.
            Errors of either reach the pool.
    """
    _die_with_the_program(int(sys.argv[2]))
    os.set_inheritable(int(sys.argv[1]), False)  # not for programs that the task starts
    connection, settings = Connection(int(sys.argv[1])), json.loads(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = settings["memory_mb"]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20))
    reason = "ran out of memory" + (f", {limit} MB" if limit is not None else "")
    out_of_memory = json.dumps({"failure": {"reason": reason}, "last": True}).encode()
    with suppress(EOFError, OSError):  # the pool is gone
        try:
            answer = load(settings["settings"])
        except BaseException as error:
            connection.send_bytes(_failure(error))
            return
        connection.send_bytes(b'{"reply": null}')
        while True:
            header, payload = json.loads(connection.recv_bytes()), connection.recv_bytes()
            try:
                reply = json.dumps({"reply": answer(header, payload)}).encode()
            except MemoryError:
                connection.send_bytes(out_of_memory)
                return  # what a failed allocation left behind may be broken
            except BaseException as error:
                reply = _failure(error)
            connection.send_bytes(reply)


def _die_with_the_program(watched: int) -> None:
    """Have the kernel kill this session when the pipe's other end closes: also while C code holds the interpreter."""
    os.set_inheritable(watched, False)
    fcntl.fcntl(watched, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)


def _failure(error: BaseException) -> bytes:
    try:
        text = str(error)
    except Exception:  # of an exception class of a plug-in
        text = ""
    reason = f"{type(error).__name__}: {text}"[:MAX_REASON]
    lines = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
    return json.dumps({"failure": {"reason": reason, "traceback": lines}}).encode()

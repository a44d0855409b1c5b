"""What SIGTERM, SIGINT (Ctrl-C) and SIGHUP do to one rank of a training, and to the processes that it forks.

Signals come to whole groups: torchrun passes them on by `killpg`, Slurm sends them to every process of a step, so one
stop may reach a rank several times, and its DataLoader workers as well. Python runs handlers between the bytecodes of
the main thread, which may sit in a collective for long. Hence

- a thread reads what arrives (`signal.set_wakeup_fd`): either the process ends at once with one line, or the signal is
  kept for the training loop;
- forked children leave these signals to their parent, end when it ends them, and die with it.

Only the standard library is imported here: this is in place before torch is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# One stop may come by way of Slurm, of the shell and of torchrun; a second Ctrl-C comes later than that.
DUPLICATES = 2.0  # seconds
STOPPED = 143  # 128 + SIGTERM, as a shell would say: stopped, and saved
INTERRUPTED = 130  # 128 + SIGINT: the same, by a person


def exit_code(number: int) -> int:
    """That of a training which this signal has stopped, and which has lost nothing."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def name_of(number: int) -> str:
    return "Ctrl-C (SIGINT)" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """The signals that stop this process, from `listen` on.

    Attributes:
        received: the first that came while they were kept; 0 if there was none.
        ending: what to do with one that is not kept: (signal, whether one was kept before) -> exit code. It is called
            on a thread of its own, and the process then ends at once.
    """

    def __init__(self, ending: Callable[[int, bool], int]) -> None:
        self.received = 0
        self.ending = ending
        self._since = 0.0
        self._kept = False
        self._numbers: set[int] = set()
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOPS:
            self.add(number)
        os.register_at_fork(before=self._before_fork, after_in_parent=self._unblock, after_in_child=self._in_child)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()

    def add(self, number: int) -> None:
        """Treat one more signal as those of STOPS. On the main thread."""
        self._numbers.add(number)
        signal.signal(number, lambda *_: None)  # the thread does the work
        signal.siginterrupt(number, False)

    def keep(self) -> None:
        """From now on a signal waits in `received`."""
        self._kept = True

    def end_at_once(self) -> None:
        """From now on a signal ends the process."""
        self._kept = False

    def _watch(self) -> None:
        while True:
            for number in os.read(self._pipe, 64):
                if number in self._numbers:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        first, self.received = self.received, self.received or number
        if self._kept and not first:
            self._since = now
            if os.environ.get("RANK", "0") == "0":
                again = " Once more ends at once, without saving." if number == signal.SIGINT else ""
                say(f"> {name_of(number)}: the step at hand is finished, then a checkpoint saved.{again}")
        elif self._kept and (signal.SIGINT not in (first, number) or now - self._since < DUPLICATES):
            return
        else:
            code = 1
            try:
                code = self.ending(number, bool(first))
            finally:
                os._exit(code)

    # ---------------------------------------------------------------------------------------------- forked processes

    def _before_fork(self) -> None:
        # Until the child has settled, a signal to the group waits; one to this process is taken right after.
        self._forks_on_main = threading.current_thread() is threading.main_thread()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _in_child(self) -> None:
        signal.set_wakeup_fd(-1)
        if self._forks_on_main:  # the kernel looks at the thread that forked
            die_with_parent()
        threading.Thread(target=self._obey_parent, name="stop-signals", daemon=True).start()

    def _obey_parent(self) -> None:
        """All these signals stay blocked in a child. Ignored they could not be told apart by their senders."""
        parent = os.getppid()
        while True:
            taken = signal.sigwaitinfo(self._numbers)
            if taken.si_pid == parent:  # as multiprocessing and DataLoaders end their processes
                os._exit(0)


_signals: StopSignals | None = None


def listen(ending: Callable[[int, bool], int] | None = None) -> StopSignals:
    """The signals of this process; the first call, on the main thread, begins to take them, with this ending."""
    global _signals
    if _signals is None:
        _signals = StopSignals(ending or _end_without_a_word)
    return _signals


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        parent, set_death_signal = os.getppid(), 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was already dead
            os.kill(os.getpid(), signal.SIGKILL)


def say(line: str) -> None:
    """Print past Python's buffers, whose locks another thread may hold."""
    os.write(2, f"{line}\n".encode())


def _end_without_a_word(number: int, _: bool) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{name_of(number)} while starting: nothing was trained yet")
    return 1

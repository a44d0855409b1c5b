"""The console of a person, and the log file that takes what libraries print.

Megatron, torch, gloo and C++ code below them write to file descriptors 1 and 2, wherever those lead. `quiet` leads both
to a log file. Our own lines (`say`, `complain`) and the progress bars go on to the console. Only the standard library
is imported here: this is in place before torch is.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO, cast

from megatron_idft.errors import verbose

OUT, ERR = 1, 2
LOGS = "logs"  # in an output folder


def say(text: str) -> None:
    """Print to the console's standard output."""
    print(text, file=_streams()[0], flush=True)


def complain(text: str) -> None:
    """Print to the console's standard error."""
    print(text, file=error_stream(), flush=True)


def error_stream() -> TextIO:
    """The console's standard error, for progress bars."""
    return _streams()[1]


def _streams() -> tuple[TextIO, TextIO]:
    return (sys.stdout, sys.stderr) if _quiet is None else (_quiet.out, _quiet.err)


@contextlib.contextmanager
def quiet(verb: str, filled: Literal["kept", "deleted"] = "deleted") -> Iterator[None]:
    """Within this block the console is ours, and what libraries print goes to a log file.

    The file lies in the temporary directory until `keep_log` gives it a place. A temporary log is deleted at the end of
    a block without an error. After an error it stays until `names_log` or `drop_log` decides. With --verbose, or where
    no file can be made, everything stays on the console.

    What is printed after the block while the process ends goes to the log as well.

    Args:
        verb: for the names of the logs.
        filled: what becomes of a temporary log that is not empty; where it is kept, its path is printed.
    """
    global _quiet, _last
    forget_log()
    if verbose() or sys.stdout is None or sys.stderr is None:
        yield
        return
    try:
        _quiet = _last = _Quiet(verb)
    except OSError:  # no file can be made: nothing may be lost
        yield
        return
    try:
        yield
    except Exception:
        _end()
        raise
    except BaseException:  # a signal, which has been reported
        _end()
        drop_log()
        raise
    _end()
    if _last.temporary and filled == "kept" and _last.path.stat().st_size:
        complain(f"> what libraries printed is in {_last.path}")
        _last.temporary = False
    drop_log()


def keep_log(output: Path) -> None:
    """Move this rank's log to a new file in `output`/logs, and print its path on rank 0.

    Where that folder cannot be written the log stays in the temporary directory.
    """
    if _quiet is None:
        return
    rank = os.environ.get("RANK")
    with contextlib.suppress(OSError):
        _quiet.move(output / LOGS, "" if rank is None else f"-rank{rank}")
    _quiet.temporary = False
    if rank in (None, "0"):
        others = ", one for each rank" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        say(f"> log of Megatron and the libraries{others}: {_quiet.path}")


def retract_log() -> None:
    """After a refusal: delete the logs of this launch, and their folders, where the output folder holds nothing else.

    Those of the other ranks of this node, too: torchrun may have killed them.
    """
    if _last is None or _last.temporary or _last.path.parent.name != LOGS:
        return
    logs = _last.path.parent
    with contextlib.suppress(OSError):
        if [entry.name for entry in logs.parent.iterdir()] == [LOGS]:
            _last.temporary = True  # nobody needs to know its path
            for path in logs.glob(f"*-{_launch()}*.log"):
                path.unlink(missing_ok=True)
            for made in _last.made:  # which fails while logs of other launches are there
                made.rmdir()


def kept_log() -> Path | None:
    """The log whose path the user knows."""
    return None if _last is None or _last.temporary else _last.path


def where_log_is() -> str:
    """A line that ends the message of an error or of a stop; empty where the user knows of no log."""
    path = kept_log()
    return "" if path is None else f"\nThe log is {path}"


def write_log(text: str) -> Path | None:
    """Append to the log, also after its block, and keep it; returns its path, None where there is none."""
    if _last is None:
        return None
    with open(_last.path, "a", encoding="utf-8", errors="replace") as file:
        file.write(text)
    _last.temporary = False
    return _last.path


def drop_log() -> None:
    """Delete the log of the last block, unless it was kept."""
    if _last is not None and _last.temporary:
        _last.path.unlink(missing_ok=True)


def forget_log() -> None:
    """A new verb begins: an error of it is not told with the log of an earlier one of this process."""
    global _last
    drop_log()
    _last = None


class _Quiet:
    """File descriptors 1 and 2 lead to a log file; `out` and `err` to where they led before."""

    def __init__(self, verb: str) -> None:
        self.descriptor, name = tempfile.mkstemp(prefix=f"megatron-idft-{verb}-", suffix=".log")
        self.path, self.temporary, self.made = Path(name), True, list[Path]()
        with contextlib.ExitStack() as self._undo:
            self.out, self.err = self._divert("stdout", OUT), self._divert("stderr", ERR)
            if not faulthandler.is_enabled() and _number(self.err) is not None:
                faulthandler.enable(self.err)  # a crash in C code is seen on the console too
                self._undo.callback(faulthandler.disable)
            self._undo = self._undo.pop_all()

    def _divert(self, name: str, number: int) -> TextIO:
        stream: TextIO = getattr(sys, name)
        stream.flush()
        before = os.dup(number)
        self._undo.callback(os.close, before)
        self._undo.callback(os.dup2, before, number)
        os.dup2(self.descriptor, number)
        leads_there = _number(stream) == number
        if leads_there and isinstance(stream, io.TextIOWrapper):
            self._undo.callback(stream.reconfigure, line_buffering=stream.line_buffering)
            stream.reconfigure(line_buffering=True)  # both are one file now, and its lines in order
            self._undo.callback(stream.flush)
        else:  # somebody, such as pytest or a notebook, has replaced Python's stream
            replacement = open(number, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
            self._undo.callback(setattr, sys, name, stream)
            self._undo.callback(replacement.close)
            setattr(sys, name, replacement)
        return cast(TextIO, _Terminal(before, stream.encoding)) if leads_there else stream

    def move(self, folder: Path, suffix: str) -> None:
        self.made = [made for made in (folder, folder.parent) if not made.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        path, new = _new_file(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{_launch()}{suffix}")
        sys.stdout.flush()
        sys.stderr.flush()
        old = os.dup(self.descriptor)
        for number in (self.descriptor, OUT, ERR):
            os.dup2(new, number)
        os.close(new)
        os.lseek(old, 0, os.SEEK_SET)
        _write(self.descriptor, f"{shlex.join(sys.argv)}\n".encode(errors="replace"))
        with open(old, "rb") as begun:
            _write(self.descriptor, begun.read())
        self.path.unlink(missing_ok=True)
        self.path = path

    def end(self) -> None:
        self._undo.close()


def _launch() -> str:
    """The same for the ranks of one node that one torchrun has started."""
    return f"{socket.gethostname()}-{os.getppid() if 'RANK' in os.environ else os.getpid()}"


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    for number in range(1, 1000):
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}.log"
        with contextlib.suppress(FileExistsError):  # another launch began in the same second
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
    raise FileExistsError(path)


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError):  # it is no file
        return None


class _Terminal(io.TextIOBase):
    """Writes past all buffers: nothing is left in one where the process dies, and handlers of signals may write."""

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]  # tqdm draws with what it can write
        return self._encoding

    def write(self, text: str) -> int:
        _write(self._descriptor, text.encode(self._encoding, "backslashreplace"))
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


_quiet: _Quiet | None = None  # within a block
_last: _Quiet | None = None  # of this block or, after it, of the last one
_descriptor_at_exit: int | None = None


def _end() -> None:
    global _quiet, _descriptor_at_exit
    if _quiet is None:
        return
    ended, _quiet = _quiet, None
    ended.end()
    if _descriptor_at_exit is None:
        atexit.register(_log_the_end)
    else:
        os.close(_descriptor_at_exit)
    _descriptor_at_exit = ended.descriptor


def _log_the_end() -> None:
    """Lead what torch says of a process that ends, and what it prints from C++ then, to the log."""
    assert _descriptor_at_exit is not None
    for stream, number in ((sys.stdout, OUT), (sys.stderr, ERR)):
        stream.flush()
        os.dup2(_descriptor_at_exit, number)

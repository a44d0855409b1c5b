"""A verb that fails leaves one message with the remedy on the console. The traceback goes to a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megatron_idft import console
from megatron_idft.errors import LostRankError, UserError, verbose
from megatron_idft.integration.platform.megatron_errors import is_lost_peer
from megatron_idft.integration.platform.outcome import tell_script
from megatron_idft.integration.platform.signals import INTERRUPTED, STOPPED

FAILED, UNUSABLE = 1, 2
_LONGEST = 4000  # characters of a message: some hold what a file held
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Failure:
    """The message, the exit code, and whether the traceback says more than the message."""

    message: str
    exit_code: int
    keep_traceback: bool = False


def report(verb: str, error: Exception) -> int:
    """Say on the console, and to torchrun, why `verb` failed; returns the exit code.

    Of the ranks of one node that fail in the same way, the first one speaks.
    """
    failure = explain(error, verb)
    message = _clip(failure.message)
    kind = "" if failure.exit_code in (INTERRUPTED, STOPPED) else "error: "
    text, speaks = f"megatron-idft {verb}: {kind}{message}", _speaks(message)
    tell_script(text, failure.exit_code)
    if failure.keep_traceback and (speaks or console.kept_log()):
        text += _kept(verb, error)
    else:
        if failure.exit_code == UNUSABLE:
            console.retract_log()
        text += console.where_log_is()
    console.drop_log()
    if speaks:
        print(text, file=sys.stderr, flush=True)
    _tell_agent(text, speaks, is_cause=speaks and not _has_lost_a_rank(error))
    return failure.exit_code


def explain(error: Exception, verb: str) -> Failure:
    """The message for an error, whatever it is."""
    if isinstance(error, UserError):
        return Failure(str(error), error.exit_code)
    if _has_lost_a_rank(error):
        return Failure(
            f"rank {os.environ.get('RANK')} has lost another rank: {_first_line(error)}. A process or a node of this"
            " launch has died or hangs; its own lines, or its agent's, say why. Start the same command again",
            FAILED,
            keep_traceback=True,
        )
    if isinstance(error, ModuleNotFoundError) and (missing := _missing_package(error, verb)):
        return Failure(missing, UNUSABLE)
    if isinstance(error, OSError) and (text := _of_the_system(error)):
        return text
    if _is_out_of_memory(error):
        return Failure(
            f"out of memory: {_first_line(error)}. Use a smaller --micro-batch-size, --recompute-granularity full, or"
            " more tensor or pipeline parallelism; `megatron-idft plan --gpus N <the same flags>` counts the need",
            FAILED,
            keep_traceback=True,
        )
    from megatron_idft.integration.platform.megatron_errors import translate  # imports nothing of Megatron

    translated = translate(error)
    if translated is not None:
        return Failure(translated, UNUSABLE, keep_traceback=True)
    return Failure(
        f"{_first_line(error)} ({_where(error)}). This is no mistake of yours that is known here, but a bug, of"
        " megatron-idft, of Megatron or of your script",
        FAILED,
        keep_traceback=True,
    )


def _has_lost_a_rank(error: Exception) -> bool:
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return isinstance(error, LostRankError) or (several and is_lost_peer(error))


def _missing_package(error: ModuleNotFoundError, verb: str) -> str | None:
    from megatron_idft.integration.platform.doctor import install_line

    name = (error.name or "").partition(".")[0]
    install = install_line(name)
    return install and f"`{verb}` needs {name}, which is not installed: {install}; `megatron-idft doctor` lists all"


def _of_the_system(error: OSError) -> Failure | None:
    if isinstance(error, BrokenPipeError):
        return Failure("a program that this one wrote to has ended, such as one after `|`", FAILED, keep_traceback=True)
    if error.errno in _NO_SPACE:
        return Failure(
            f"{error.filename or 'a file'}: {os.strerror(error.errno)}: free some space and start again", FAILED
        )
    if error.filename is None:
        return Failure(str(error), UNUSABLE) if isinstance(error, FileNotFoundError) else None
    remedies = {
        FileNotFoundError: "pass the path of a file or folder that is there",
        NotADirectoryError: "pass a folder",
        IsADirectoryError: "pass a file",
        FileExistsError: "name another one",
        PermissionError: "make it readable and writable for you, or name another one",
    }
    for kind, remedy in remedies.items():
        if isinstance(error, kind):
            return Failure(f"{error.filename}: {error.strerror}: {remedy}", UNUSABLE)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} characters more)"


def _kept(verb: str, error: BaseException) -> str:
    """Where the traceback is: in a file, or on the console where that is wished for."""
    text = "".join(traceback.format_exception(error))
    if verbose():
        sys.stderr.write(text)
        return ""
    try:
        if log := console.write_log(text):
            return f"\nThe traceback is at the end of {log}, after what libraries printed (--verbose shows both here)"
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"megatron-idft-{verb}-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
    except OSError:  # the disk is full: nothing must hide the message
        return "\n--verbose shows the traceback"
    return f"\nThe traceback is in {file.name} (--verbose shows it here)"


def _speaks(message: str) -> bool:
    """Whether no other rank of this node and start has said so: torchrun gives them a folder, which it deletes."""
    path = _error_file()
    if path is None:
        return True
    said = path.parent.parent / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _error_file() -> Path | None:
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(place) if place else None


def _tell_agent(text: str, spoke: bool, is_cause: bool) -> None:
    """Give torchrun the message. Its last lines show that of the rank that failed first: one that knows the cause.

    In the form of torch.distributed.elastic.multiprocessing.errors.ErrorHandler, with the message for a call stack.
    """
    path = _error_file()
    if path is None:
        return
    when = int(time.time()) + (0 if is_cause else 1)  # torchrun compares whole seconds
    shown = text if spoke else "the same error as another rank's"
    report = {"message": shown, "extraInfo": {"py_callstack": shown, "timestamp": str(when)}}
    with contextlib.suppress(OSError):
        path.write_text(json.dumps({"message": report}), encoding="utf-8")

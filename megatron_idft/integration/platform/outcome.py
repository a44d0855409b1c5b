"""Reports how a process ended to those who started it, torchrun and launch/train.sh, whose last lines say it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path


def begin() -> None:
    """Forget what processes of this launch, which torchrun starts again, have reported before."""
    file = os.environ.get("MEGATRON_IDFT_OUTCOME")
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(file).unlink(missing_ok=True)


def tell_launcher(message: str, code: int) -> None:
    """Give torchrun the message, and train.sh the message and the exit code."""
    tell_script(message, code)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # As torch.distributed.elastic.multiprocessing.errors writes it: its "call stack" is shown.
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # a full disk, say: the message has been printed as well
            Path(file).write_text(json.dumps({"message": report}), encoding="utf-8")


def tell_script(message: str, code: int) -> None:
    """Give train.sh the message and the exit code: that of torchrun is 1, whatever it was.

    The first report of a node counts: the other processes end because of that one.
    """
    if file := os.environ.get("MEGATRON_IDFT_OUTCOME"):
        with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as outcome:
            outcome.write(f"{code}\n{message}\n")

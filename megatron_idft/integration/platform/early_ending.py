"""The end of a training on a signal that comes before its flags are parsed. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_idft.checkpoint.checksums import read_tracker
from megatron_idft.errors import DamagedCheckpointError
from megatron_idft.integration.platform import signals
from megatron_idft.integration.platform.local_flags import given_flags
from megatron_idft.integration.platform.outcome import tell_launcher


def tracked_iteration(save: str | None) -> int | None:
    """The iteration that the tracker in --save names: where the next start goes on, unless that one is damaged."""
    if not save:
        return None
    try:
        tracked = read_tracker(Path(save))
    except (DamagedCheckpointError, OSError):  # reported when it is read
        return None
    return tracked if isinstance(tracked, int) else None


def next_start(save: str | None, goes_on: int | None) -> str:
    """Where the next start of a training goes on, for a person."""
    if not save:
        return "Without --save nothing is kept: training begins anew"
    if goes_on is None:
        return f"There is no checkpoint in {save} yet: training begins anew"
    return f"Training goes on from iteration {goes_on} in {save}"


def before_flags(argv: Sequence[str]) -> Callable[[int, bool], int]:
    """The `StopSignals.ending` of a training with these words: it says what a later one before the first step says."""
    save = given_flags(argv).get("--save")

    def end(number: int, again: bool) -> int:
        return end_before_first_step(number, save, tracked_iteration(save))

    return end


def end_before_first_step(number: int, save: str | None, goes_on: int | None) -> int:
    """Say that nothing is lost. Returns the exit code: 1 where the next start has nothing to go on from."""
    where = f"{next_start(save, goes_on)} when you start the same command again"
    what = f"{signals.name_of(number)} before the first step: nothing is lost. {where}"
    return end_with(what, 1 if goes_on is None else signals.exit_code(number))


def end_with(what: str, code: int) -> int:
    """Say on the first rank of the node, and to the launcher, what ends a training. Returns the exit code."""
    message = f"megatron-idft train: {what}"
    tell_launcher(message, code)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        signals.say(message)
    return code

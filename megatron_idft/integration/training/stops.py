"""How a training run can end early, by a signal (SIGTERM, Ctrl-C) or a fault: in one message, with a remedy.

Megatron's own exceptions and exit codes are turned into `TrainingStoppedError`, which the program prints, and which
torchrun and launch/train.sh show in their last lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_idft.errors import LostRankError, TrainingStoppedError, UserError
from megatron_idft.integration.platform import early_ending, signals, upstream
from megatron_idft.integration.platform.megatron_errors import is_lost_peer
from megatron_idft.integration.platform.outcome import tell_launcher
from megatron_idft.integration.platform.ranks import from_rank_0, gather, print_on_rank_0, reduced
from megatron_idft.integration.training.checkpoints import RunCheckpoints

NOT_FINITE = "not_finite.jsonl"  # in --save: the steps that were not finite, for the run that meets one again


class Stops:
    """Watches one run for what ends it. `checkpoints`: where the next start will go on."""

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self._checkpoints = checkpoints
        self._saving = False
        self._args: argparse.Namespace | None = None
        self._trains = False
        self._wants_signal_handler = False
        self._stopped_by = 0
        self._all_know = False
        self._signals = signals.listen()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around Megatron's saving of a checkpoint."""
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer:  # a restart repeats what came after the checkpoint, nothing before it
            writer.flush()
        self._saving = True
        yield
        self._saving = False

    # ------------------------------------------------------------------------------------------------------- signals

    def postpone_signal_handler(self, args: argparse.Namespace) -> None:
        """Called when the flags are parsed. Until the first step a signal ends the process at once."""
        self._args = args
        self._wants_signal_handler = args.exit_signal_handler and args.save is not None
        args.exit_signal_handler = False
        self._signals.ending = self._end_at_once
        self._signals.add(args.exit_signal)

    def arm_signal_handler(self, args: argparse.Namespace) -> None:
        """Called before each step: from the first on a signal is kept until the step is done."""
        if self._trains:
            return
        self._trains, self._args = True, args  # Megatron's own copy, which it keeps up to date
        if not self._wants_signal_handler:
            return
        upstream.replace("megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER", self)  # asked for `signals_received`
        args.exit_signal_handler = True
        self._signals.keep()
        print_on_rank_0(
            "> SIGTERM, Ctrl-C or SIGHUP from now on: the step is finished, a checkpoint saved, exit code"
            f" {signals.STOPPED} ({signals.INTERRUPTED} after Ctrl-C; --no-exit-signal-handler: end at once)"
        )

    def signals_received(self) -> list[bool]:
        """Whether any rank was told to stop; Megatron asks after each step. One all-reduce of a number."""
        number = self._signals.received
        # SIGTERM before the others: the machine is wanted back, whatever a person has asked for besides.
        weight = {0: 0, signals.INTERRUPTED: 1, signals.STOPPED: 2}[number and signals.exit_code(number)]
        most = reduced(weight * 256 + number, torch.distributed.ReduceOp.MAX)
        self._stopped_by = most % 256
        return [bool(most)]

    def stopped(self) -> bool:
        """The same at any other moment when all ranks ask."""
        return self._args is not None and self._args.exit_signal_handler and any(self.signals_received())

    def after_training(self) -> None:
        """Called on every rank when the last checkpoint is complete: what is still to do, the next start can do."""
        if self.stopped():
            raise self._saved_and_stopped()
        self._signals.end_at_once()

    def _saved_and_stopped(self) -> TrainingStoppedError:
        self._all_know = True
        assert self._args is not None
        return TrainingStoppedError(
            f"{signals.name_of(self._stopped_by)}: saved at iteration {self._checkpoints.continues_at} in"
            f" {self._args.save}. Start the same command again to go on",
            signals.exit_code(self._stopped_by),
        )

    def _end_at_once(self, number: int, again: bool) -> int:
        """On the thread of the signals: say what is lost, and with which exit code to end."""
        assert self._args is not None
        args, goes_on = self._args, self._checkpoints.next_start(self._args)
        if not self._trains:
            return early_ending.end_before_first_step(number, args.save, goes_on)
        code = 1
        if goes_on is not None and goes_on >= (args.train_iters or 0):
            code, what = signals.exit_code(number), f"after the last step. The checkpoint of iteration {goes_on} is"
            what += f" complete in {args.save}; start the same command again for what comes after it"
        else:
            what = f"{'again, ' if again else ''}in iteration {args.curr_iteration + 1}: ended at once. "
            what += self._next_start_by_hand(args) + ("; what came after it is lost" if goes_on is not None else "")
        return early_ending.end_with(f"{signals.name_of(number)} {what}", code)

    # --------------------------------------------------------------------------------------------------------- faults

    def check_step(self, args: argparse.Namespace, iteration: int, skipped: Any, gradient_norm: float | None) -> None:
        """Stop before a step that was not finite is saved; `iteration` counts from 1.

        Megatron looks at the loss and at each bucket of gradients, but not in the first step after a start.
        """
        if skipped or gradient_norm is None or math.isfinite(gradient_norm):
            return
        raise TrainingStoppedError(self._not_finite(args, iteration, f"the gradient norm is {gradient_norm}"))

    def _not_finite(self, args: argparse.Namespace, iteration: int, what: str, advice: str = "") -> str:
        self._all_know = True
        before = from_rank_0(partial(_note_not_finite, args.save, iteration, what))
        return _not_finite(iteration, what, before) + advice + self._next_start(args)

    @contextmanager
    def explaining(self, args: argparse.Namespace) -> Iterator[None]:
        """Raise what `explain` says instead of an error, and tell torchrun. What all ranks know, rank 0 says."""
        try:
            yield
        except BaseException as error:
            explained = self.explain(error, args)
            if explained is error:
                raise
            if self._all_know and _rank() != 0:
                code = getattr(explained, "exit_code", 1)
                tell_launcher(f"megatron-idft train: {explained}", code)
                raise SystemExit(code) from error
            raise explained from error

    def explain(self, error: BaseException, args: argparse.Namespace) -> BaseException:
        """The error to raise for one that ended the training: itself, where there is nothing to add."""
        chain = list(_chain(error))
        if isinstance(error, SystemExit):
            return self._explain_exit(error, args)
        if isinstance(error, UserError):
            return error
        lost = next((link for link in chain if _is_lost_peer(link)), None)
        not_written = any(isinstance(link, CheckpointException) and link.args[:1] == ("write",) for link in chain)
        if not_written or (self._saving and lost is None and any(isinstance(link, OSError) for link in chain)):
            return TrainingStoppedError(self._save_failed(args, chain))
        if lost is not None:
            return LostRankError(
                f"rank {_rank()} has lost another rank: {_first_line(lost)}. A process or a node of this run has"
                " died or hangs; its own lines, or its agent's, say why. " + self._next_start(args)
            )
        match = re.search(r"Unexpected result \S+ \(message='(.*)'\)", str(error))
        if match:  # --rerun-mode disabled: only this rank knows
            iteration, where = args.curr_iteration + 1, f"rank {_rank()} on {os.uname()[1]}"
            before = _note_not_finite(args.save, iteration, match[1])
            return TrainingStoppedError(_not_finite(iteration, f"{where}: {match[1]}", before) + self._next_start(args))
        return error

    def _explain_exit(self, error: SystemExit, args: argparse.Namespace) -> BaseException:
        from megatron.core import rerun_state_machine

        if self._stopped_by:
            return self._saved_and_stopped()
        reproducible = rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE
        if error.code in (reproducible, rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION):
            machine = rerun_state_machine.get_rerun_state_machine()
            failed = machine.failed_validation_call
            mine = f"rank {_rank()} on {os.uname()[1]}: {failed.caller.message}" if failed is not None else ""
            what = "; ".join(text for text in gather(mine) if text)
            advice = (
                "The same came out when Megatron computed the step a second time. It will now compute it on another"
                " GPU only: start on other nodes, or, to do without that test, add --rerun-mode disabled. "
                if error.code == reproducible
                else "Megatron computed the step a second time: its lines above say what came out. "
            )
            # Not the machine's own count, which is one too high from a resume on.
            text = self._not_finite(args, args.curr_iteration + 1, what, advice)
            return TrainingStoppedError(text, int(error.code or 1))
        return error

    def _save_failed(self, args: argparse.Namespace, chain: Sequence[BaseException]) -> str:
        place = Path(args.save)
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        why = next((str(link) for link in chain if isinstance(link, OSError)), "Megatron's lines above say more")
        if free < max(self._checkpoints.size, 1 << 20):
            why = f"the disk is full ({why})"
        return (
            f"a checkpoint could not be saved in {args.save}: {why}; {free / 1e9:.3f} GB are free, the last one took"
            f" {self._checkpoints.size / 1e9:.3f} GB. What was written of it will not be loaded. Free space or raise"
            " the quota (older iter_* folders and *.damaged first), or pass a longer --save-interval. "
            + self._next_start(args)
        )

    def _next_start(self, args: argparse.Namespace) -> str:
        """Where the next start goes on, and who starts it."""
        used, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        if int(used) < int(most):
            return f"{self._where(args)}; torchrun restarts it ({used} of {most} restarts used)"
        return self._next_start_by_hand(args) + " (torchrun does so by itself with --max-restarts)"

    def _next_start_by_hand(self, args: argparse.Namespace) -> str:
        return self._where(args) + " when you start the same command again"

    def _where(self, args: argparse.Namespace) -> str:
        return early_ending.next_start(args.save, self._checkpoints.next_start(args))


def _not_finite(iteration: int, what: str, before: int) -> str:
    text = f"iteration {iteration} is not finite: {what}. "
    if not before:
        return text + "A passing fault is gone after a restart. "
    times = f"{before} time{'s' if before > 1 else ''}"
    return (
        f"{text}The same iteration was so {times} before: this is no passing fault. Look at the objective and at the"
        " records of this iteration; a smaller --lr or a corrected corpus are the usual remedies. "
    )


def _note_not_finite(save: str | None, iteration: int, what: str) -> int:
    """One rank: write the step down; how often it was so at the same iteration before."""
    if save is None:
        return 0
    path = Path(save) / NOT_FINITE
    before = 0
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        before = sum(json.loads(line)["iteration"] == iteration for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(
            json.dumps({"iteration": iteration, "what": what, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n"
        )
    return before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or is_lost_peer(error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))

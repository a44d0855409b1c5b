"""Which checkpoint a training continues, and whether it can be trusted.

Megatron saves a checkpoint and then writes its number into a tracker file; it loads what the tracker names. Around
that, this module

- records size and checksum of every file, after the files and before the tracker (checkpoint/checksums.py);
- before a load verifies the checkpoint, and goes back to the newest good one where it is damaged;
- continues the training that --save holds when the same command is started again, by torchrun or by a person, though
  --load and --finetune name the weights that it began with.

The collectives here are small: all-reduces of one number, broadcasts of file names from rank 0. What ranks have to say
of files is gathered on rank 0 after a save, and on all ranks where a checkpoint is damaged.
"""

from __future__ import annotations

import argparse
import inspect
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_idft.checkpoint import checksums
from megatron_idft.checkpoint.checksums import Record, iteration_folder
from megatron_idft.checkpoint.torch_dist import check_pickles
from megatron_idft.console import say
from megatron_idft.errors import ArgumentError, DamagedCheckpointError
from megatron_idft.integration.platform.early_ending import tracked_iteration
from megatron_idft.integration.platform.ranks import from_rank_0, gather, print_on_rank_0, reduced


class RunCheckpoints:
    """The checkpoints of one training run.

    Attributes:
        continues_at: the iteration that the next start would continue; None if there is none in --save.
        size: bytes of the newest checkpoint that this run has loaded or saved; 0 if it is not known.
    """

    def __init__(self) -> None:
        self.continues_at: int | None = None
        self.size = 0
        self._looked = False
        self._begun_with: dict[str, Any] = {}
        self._checksums = True

    def next_start(self, args: argparse.Namespace | None) -> int | None:
        """`continues_at`; before --save has been looked at, what its tracker names."""
        if self._looked or args is None or args.save is None:
            return self.continues_at
        return tracked_iteration(args.save)

    # -------------------------------------------------------------------------------------------------------- loading

    def before_loading(self, args: argparse.Namespace) -> None:
        """Settle on every rank what `args.load` shall be, and verify it. Called when torch.distributed is initialised.

        Raises:
            DamagedCheckpointError: nothing good is left to continue, or the weights to begin with are damaged.
            ArgumentError: --save holds the checkpoints of another training.
        """
        self._checksums = not args.no_checkpoint_checksums
        self._begun_with = _begun_with(args)
        # Agents count differently: one that restarts its workers for the sake of another node does not count it.
        restarts = reduced(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), torch.distributed.ReduceOp.MAX)
        if restarts:
            print_on_rank_0(f"> restart {restarts} of at most {os.environ.get('TORCHELASTIC_MAX_RESTARTS', '?')}")
        if args.save is None or args.moe_use_upcycling:
            self.verify_source(args)
            return
        home = Path(args.save)
        own = args.load is not None and _same_folder(args.load, home)
        if own and args.ckpt_step:
            self.verify_source(args)
            self.continues_at, self._looked = args.ckpt_step, True
            return
        found = self._newest_good(home)
        self._looked = True
        if found is None:
            self.verify_source(args)
            return
        known = found.record is not None and found.record.begun_with == self._begun_with
        if known:
            self._continue_own(args, found)
        elif own:
            if isinstance(found.iteration, int) and not args.finetune:
                self.continues_at = found.iteration
        elif found.record is not None:
            raise ArgumentError(
                f"--save {home} holds checkpoints of another training, begun with {_words(found.record.begun_with)},"
                f" now {_words(self._begun_with)}: pass another --save to begin this one, or --load {home} without"
                " --finetune to continue that one"
            )
        else:
            print_on_rank_0(
                f"WARNING: --save {home} holds checkpoints without a record of where they came from. This run begins as"
                f" told ({_words(self._begun_with)}) and will write over them; to continue them pass --load {home}"
            )
            self.verify_source(args)

    def _continue_own(self, args: argparse.Namespace, found: _Found) -> None:
        """Let Megatron load what --save holds, whatever weights the training began with."""
        first = [f"--load {args.load}"] if args.load is not None and not _same_folder(args.load, args.save) else []
        first += ["--finetune"] if args.finetune else []
        if not args.skip_train:  # which sets the next two by itself
            for name in ("no_load_optim", "no_load_rng"):
                if first and getattr(args, name):
                    first.append("--" + name.replace("_", "-"))
                    setattr(args, name, None)
        if first and args.ckpt_step:
            first.append(f"--ckpt-step {args.ckpt_step}")
            args.ckpt_step = None
        remark = f"; {', '.join(first)}: for the first start only" if first else ""
        print_on_rank_0(
            f"> --save {args.save} holds this training at iteration {found.iteration}: it continues there{remark}. To"
            " begin anew, pass another --save"
        )
        args.load, args.finetune = args.save, False
        if isinstance(found.iteration, int):
            self.continues_at = found.iteration

    def _newest_good(self, home: Path) -> _Found | None:
        """The checkpoint in `home` to continue; the tracker names it afterwards. None if there is none."""
        found = None
        damaged: list[str] = []
        for iteration in from_rank_0(partial(_candidates, home)):
            folder = iteration_folder(home, iteration)
            found = self._examine(folder, iteration)
            if not found.problems:
                break
            aside = from_rank_0(partial(_set_aside, folder))
            damaged.append(f"{'; '.join(found.problems[:8])}{f' (kept as {aside})' if aside else ''}")
            print_on_rank_0(f"WARNING: {home}: the checkpoint of iteration {iteration} is damaged: {damaged[-1]}")
        if found is None:
            return None
        if found.problems:
            raise DamagedCheckpointError(
                f"no checkpoint in {home} is good: {' | '.join(damaged)}. Copy a good one back under its name"
                f" (iter_N, with N in {checksums.TRACKER}), or begin anew with another --save"
            )
        if damaged:
            print_on_rank_0(
                f"WARNING: {home}: training goes on from iteration {found.iteration}, the newest good checkpoint, and"
                " repeats what came after it. Check that disk; remove the *.damaged folders when you have seen them"
            )
        from_rank_0(partial(_point_tracker, home, found.iteration))
        return found

    def verify_source(self, args: argparse.Namespace) -> None:
        """Verify what --load or --pretrained-checkpoint will give, where it is not this run's own.

        Every file is read once, by one of the ranks.

        Raises:
            DamagedCheckpointError: it is not as it was saved.
        """
        self._checksums = not args.no_checkpoint_checksums
        for place in (args.load, args.pretrained_checkpoint):
            if place is None:
                continue
            folder = Path(place)
            iteration = args.ckpt_step or from_rank_0(partial(checksums.read_tracker, folder))
            if iteration is None:
                continue
            found = self._examine(iteration_folder(folder, iteration), iteration)
            if found.problems:
                others = [number for number in checksums.saved_iterations(folder) if number != iteration]
                raise DamagedCheckpointError(
                    f"{folder}: the checkpoint of iteration {iteration} is damaged: {'; '.join(found.problems[:8])}."
                    " Copy it again from where it came from"
                    + (f", or pass --ckpt-step with one of {others[:8]}" if others else "")
                )
            return

    def _examine(self, folder: Path, iteration: int | str) -> _Found:
        """Look at one checkpoint with all ranks, each at a share of its files; say what was found."""
        record, wrong = from_rank_0(partial(_read_record, folder))
        if record is None:
            if not wrong:
                from_rank_0(partial(check_pickles, folder))
                print_on_rank_0(f"> {folder} is not verified: it has no {checksums.RECORD}")
            return _Found(iteration, None, wrong)
        start = time.monotonic()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        share = checksums.share_to_verify(record.files, rank, ranks)
        wrong = checksums.problems(folder, share, self._checksums)
        if reduced(len(wrong), torch.distributed.ReduceOp.SUM):
            wrong = [text for part in gather(wrong) for text in part]
        else:
            from_rank_0(partial(check_pickles, folder))
            self.size = record.size
            how = "sizes and checksums" if self._checksums else "sizes"
            print_on_rank_0(f"> {folder} is verified by {how}: {_amount(record)} in {time.monotonic() - start:.1f} s")
        return _Found(iteration, record, wrong)

    # --------------------------------------------------------------------------------------------------------- saving

    def around_save(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """`megatron.core.dist_checkpointing.save`: record its files as its last act, before the tracker is written."""
        folder = Path(call.arguments["checkpoint_dir"])
        if not folder.name.startswith("iter_"):  # another tool's part of a checkpoint
            return original(*call.args, **call.kwargs)
        iteration = int(folder.name.removeprefix("iter_"))
        if torch.distributed.get_rank() == 0:
            checksums.begin_writing(folder)
        request = original(*call.args, **call.kwargs)
        if request is None:
            self._record(folder, iteration)
        else:  # --async-save: when the files are complete, on all ranks
            request.finalize_fns.append(partial(self._record, folder, iteration))
        return request

    def after_save(self, args: argparse.Namespace, iteration: int) -> None:
        """A checkpoint of --save is complete, or, with --async-save, on its way."""
        folder = iteration_folder(Path(args.save), iteration)
        if args.ckpt_format != "torch_dist" and not args.async_save:  # the other formats do not pass `around_save`
            self._record(folder, iteration)

    def _record(self, folder: Path, iteration: int) -> None:
        start = time.monotonic()
        names = checksums.share_to_record(checksums.files_of(folder), torch.distributed.get_rank())
        mine = checksums.sum_files(folder, names, self._checksums)
        size = reduced(sum(entry.size for entry in mine.values()), torch.distributed.ReduceOp.SUM)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        every: list[Any] | None = [None] * ranks if rank == 0 else None
        torch.distributed.gather_object(mine, every, dst=0)
        if every is not None:
            record = Record({name: entry for part in every for name, entry in part.items()}, self._begun_with)
            checksums.write_record(folder, record)
            say(f"> {folder / checksums.RECORD}: {_amount(record)} in {time.monotonic() - start:.1f} s")
        self.continues_at, self.size = iteration, size


class _Found(NamedTuple):
    """A checkpoint that was looked at: it is good if there are no problems."""

    iteration: int | str
    record: Record | None
    problems: list[str]


def loaded_digest(args: argparse.Namespace) -> str | None:
    """What tells the weights that `args` load from all others; None where their checkpoint has no checksums."""
    for place in filter(None, (args.load, args.pretrained_checkpoint)):
        iteration = args.ckpt_step or checksums.read_tracker(Path(place))
        if iteration is not None:
            return checksums.content_digest(iteration_folder(Path(place), iteration))
    return None


def _begun_with(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that say which weights a training begins with."""
    own = args.load is not None and args.save is not None and _same_folder(args.load, args.save)
    load, pretrained = (None if own else args.load), args.pretrained_checkpoint
    return {
        "--load": load and os.path.realpath(load),
        "--pretrained-checkpoint": pretrained and os.path.realpath(pretrained),
        "--finetune": bool(args.finetune),
        "--ckpt-step": None if own else args.ckpt_step,
    }


def _words(begun_with: dict[str, Any]) -> str:
    given = [flag if value is True else f"{flag} {value}" for flag, value in begun_with.items() if value]
    return " ".join(given) or "random weights"


def _candidates(home: Path) -> list[int | str]:
    """Rank 0: the checkpoints that may be continued, the best first."""
    saved = checksums.saved_iterations(home)
    try:
        tracked = checksums.read_tracker(home)
    except DamagedCheckpointError as error:
        say(f"WARNING: {error}. The newest complete checkpoint is taken")
        return [number for number in saved if checksums.is_complete(iteration_folder(home, number))]
    if isinstance(tracked, str):
        return [tracked]
    for number in saved:
        folder = iteration_folder(home, number)
        if (tracked is None or number > tracked) and not checksums.is_complete(folder):
            say(f"> {folder} is half-written, its save did not end: it is not used, and written anew")
    if tracked is None:  # only what is proven: nobody has said that there was anything to continue
        return [number for number in saved if (iteration_folder(home, number) / checksums.RECORD).is_file()]
    # Never one that is newer than the tracker says: somebody may have set it back.
    return [tracked, *(number for number in saved if number < tracked)]


def _read_record(folder: Path) -> tuple[Record | None, list[str]]:
    """Rank 0: the record, and what is wrong before any file is read."""
    if not folder.is_dir():
        aside = sorted(path.name for path in folder.parent.glob(f"{folder.name}.damaged*"))
        return None, [f"{folder.name}: missing{f' ({aside[-1]} was set aside)' if aside else ''}"]
    try:
        record = checksums.read_record(folder)
    except DamagedCheckpointError as error:
        return None, [str(error)]
    if record is None and not checksums.is_complete(folder):
        return None, [f"{folder.name}: half-written, its save did not end"]
    return record, []


def _set_aside(folder: Path) -> str | None:
    return str(checksums.set_aside(folder)) if folder.is_dir() else None


def _point_tracker(home: Path, iteration: int | str) -> None:
    if isinstance(iteration, int):
        try:
            if checksums.read_tracker(home) == iteration:
                return
        except DamagedCheckpointError:
            pass
        checksums.write_tracker(home, iteration)


def _same_folder(a: str | Path, b: str | Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _amount(record: Record) -> str:
    return f"{len(record.files)} files, {record.size / 1e9:.3f} GB"

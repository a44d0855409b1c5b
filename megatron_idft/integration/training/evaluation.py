"""Validation sets by name: their flags, and Megatron's evaluation of one after the other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_idft.checkpoint.best import BestCheckpoints
from megatron_idft.data.packed.dataset import RepeatedRounds
from megatron_idft.errors import ArgumentError

MOST_SOURCES = 64  # of which metrics are kept without being asked


@dataclass(frozen=True)
class ValidationSet:
    """One validation set.

    Attributes:
        name: "" for the set without one.
        samples: how many it has.
        iterations: of one evaluation.
    """

    name: str
    samples: int
    iterations: int

    @property
    def suffix(self) -> str:
        """The suffix that Megatron gives `validation` in its metric keys."""
        return f"-{self.name}" if self.name else ""


def add_evaluation_arguments(group: Any) -> None:
    """Add the flags of validation sets, sources and of keeping checkpoints by a metric."""
    group.add_argument(
        "--sft-valid-data",
        nargs="+",
        metavar="[NAME=]FILE",
        default=None,
        help="Validation records, or prefixes of packs where --sft-data names packs. Files of one NAME are one set,"
        " with metrics of its own; files without a name are one set as well. Each evaluation reads all of every set"
        " once, unless --eval-iters says fewer of each. There is one before the first step;"
        " --start-eval-at-iter 1 skips it.",
    )
    group.add_argument(
        "--no-sft-source-metrics",
        action="store_true",
        help="Keep no metrics by source. By default they are kept, where the records name 2 to"
        f" {MOST_SOURCES} sources (or come from as many files), in training and in evaluation.",
    )
    group.add_argument(
        "--sft-keep-best",
        type=int,
        metavar="K",
        default=None,
        help="Keep the K best of this run's checkpoints, and the latest; delete the others. Each is ranked by the"
        " evaluation of its own iteration. Default: keep all.",
    )
    group.add_argument(
        "--sft-keep-best-metric",
        metavar="KEY",
        default=None,
        help="What ranks checkpoints: any key that an evaluation reports, such as 'lm loss validation-math' or"
        " 'ddt/phi mean validation'. Default: the lm loss of the first validation set.",
    )
    group.add_argument(
        "--sft-keep-best-mode",
        choices=("min", "max"),
        default=None,
        help="Whether the smallest or the largest value of the metric is the best. Default min.",
    )


def validate_evaluation_arguments(args: argparse.Namespace) -> None:
    """Check the flags of `add_evaluation_arguments` against each other and Megatron's.

    Raises:
        ArgumentError: flags that cannot be used; names the remedy.
    """
    if args.sft_keep_best is None:
        for name in ("sft_keep_best_metric", "sft_keep_best_mode"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(f"{flag} was given without --sft-keep-best K: add it, or drop {flag}")
        return
    if args.sft_keep_best < 1:
        raise ArgumentError(f"--sft-keep-best {args.sft_keep_best}: pass a whole number from 1")
    if not args.save or not args.sft_valid_data:
        missing = "--save DIR" if not args.save else "--sft-valid-data FILE …"
        raise ArgumentError(f"--sft-keep-best ranks checkpoints by evaluations: pass {missing}")
    if not args.eval_interval or not args.save_interval or args.save_interval % args.eval_interval:
        raise ArgumentError(
            "--sft-keep-best ranks a checkpoint by the evaluation of its own iteration: pass --eval-interval and"
            f" --save-interval, the latter a multiple of the former (got {args.eval_interval} and {args.save_interval})"
        )
    if args.save_retain_interval is not None:
        raise ArgumentError(
            "--save-retain-interval deletes checkpoints as well: drop it, or --sft-keep-best, to say which stay"
        )


def validation_sets(args: argparse.Namespace, sizes: Mapping[str, int]) -> list[ValidationSet]:
    """The sets that each evaluation reads, from their sizes in samples; none of them with --eval-iters 0."""
    sets = []
    for name, size in sizes.items():
        whole = math.ceil(size / args.eval_global_batch_size)
        iterations = whole if args.eval_iters is None else min(whole, args.eval_iters)
        if iterations:
            sets.append(ValidationSet(name, size, iterations))
    return sets


def evaluation_rounds(
    args: argparse.Namespace, sets: Sequence[ValidationSet], datasets: Mapping[str, Any], num_samples: int
) -> Any:
    """The validation dataset of `pretrain()`, None without a set.

    Args:
        args: Megatron's.
        sets: the sets that an evaluation reads.
        datasets: by the name of the set.
        num_samples: that Megatron asks for.
    """
    from megatron.core.datasets.utils import Split

    if not sets:
        return None
    size = args.eval_global_batch_size
    rounds: Any = RepeatedRounds(
        [(datasets[each.name], each.iterations * size) for each in sets],
        # Megatron counts neither the evaluation before the first step nor the one after the last.
        num_samples=num_samples + 2 * args.eval_iters * size,
    )
    rounds.split = Split.valid  # Megatron then reads it with the evaluation's batch sizes
    return rounds


def evaluate_before_training(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Evaluate the model that training begins with.

    Args:
        args: Megatron's.
        given: the arguments of Megatron's `train`.
    """
    from megatron.training import training

    hooked = training.should_disable_forward_pre_hook(args)
    if hooked:  # as the loop does: nothing was stepped yet that would have to be gathered
        training.disable_forward_pre_hook(given["model"], param_sync=False)
    names = ("forward_step_func", "model", "process_non_loss_data_func", "config", "non_loss_data_func")
    training.evaluate_and_print_results(
        prefix="iteration 0",
        iteration=0,
        data_iterator=given["valid_data_iterator"],
        **{name: given[name] for name in (*names, "pg_collection", "p2p_communicator")},
    )
    if hooked:
        training.enable_forward_pre_hook(given["model"])
    if args.num_experts is not None:
        training.get_moe_metrics_tracker().clear()


class EvaluationInterrupted(Exception):
    """A signal has come in the middle of an evaluation."""


def abandon_evaluation(model: Sequence[Any], config: Any) -> None:
    """Undo the changes that Megatron's `evaluate` makes at its start and undoes at its end."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args, get_timers
    from megatron.training.utils import print_rank_0

    print_rank_0("> the evaluation is left: a signal has come")
    for chunk in model:
        chunk.train()
    get_rerun_state_machine().set_mode(RerunMode(get_args().rerun_mode))
    config.timers = get_timers()
    get_timers()("evaluate").stop()


def best_checkpoints(args: argparse.Namespace, sets: Sequence[ValidationSet]) -> BestCheckpoints | None:
    """The checkpoints of `--sft-keep-best`; on the last rank, which knows the results of evaluations."""
    if args.sft_keep_best is None or torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return None
    metric = args.sft_keep_best_metric or f"lm loss validation{sets[0].suffix}"
    return BestCheckpoints(Path(args.save), args.sft_keep_best, metric, args.sft_keep_best_mode or "min")


@contextmanager
def as_only_set(args: argparse.Namespace, each: ValidationSet) -> Iterator[None]:
    """Megatron's flags as they are where `each` is the only validation set."""
    names = ("multiple_validation_sets", "validation_set_names", "eval_iters")
    before = {name: getattr(args, name) for name in names}
    now = (True, [each.name], [each.iterations]) if each.name else (False, None, each.iterations)
    try:
        vars(args).update(zip(names, now, strict=True))
        yield
    finally:
        vars(args).update(before)


def reported_sources(args: argparse.Namespace, names: Sequence[str]) -> tuple[str, ...]:
    """The sources that metrics are kept for, of all that the data names."""
    from megatron.training.utils import print_rank_0

    names = tuple(dict.fromkeys(names))
    if args.no_sft_source_metrics or args.sft_loss is None or len(names) < 2:
        return ()
    if len(names) > MOST_SOURCES:
        print_rank_0(
            f"> the data names {len(names)} sources, more than {MOST_SOURCES}: no metrics by source. Name fewer in the"
            " records to have them"
        )
        return ()
    return names

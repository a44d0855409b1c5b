"""Validation sets by name: their flags, and Megatron's evaluation of one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.best import BestCheckpoints
from megatron_idft.integration.arguments import ArgumentError

MOST_SOURCES = 64  # of which metrics are kept without being asked


@dataclass(frozen=True)
class ValidationSet:
    """name: "" for the set without one. samples: how many it has. iterations: of one evaluation."""

    name: str
    samples: int
    iterations: int

    @property
    def suffix(self) -> str:
        """What Megatron puts behind `validation` in its metric keys."""
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
    """Check the flags of `add_evaluation_arguments` against each other and Megatron's. Raises ArgumentError."""
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


def best_checkpoints(args: argparse.Namespace, sets: Sequence[ValidationSet]) -> BestCheckpoints | None:
    """What `--sft-keep-best` asks for; on the rank that knows what evaluations measure, the last one."""
    import torch

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

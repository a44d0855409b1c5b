"""Validation sets by name, and Megatron's evaluation of one after the other."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_idft.checkpoint.best import BestCheckpoints
from megatron_idft.data.packed.dataset import RepeatedRounds
from megatron_idft.integration.training.arguments import MOST_SOURCES


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
    # All that both take, under whatever version: process groups, and the callbacks where there are any.
    names = given.keys() & inspect.signature(training.evaluate_and_print_results).parameters.keys()
    own = {"prefix": "iteration 0", "iteration": 0, "data_iterator": given["valid_data_iterator"]}
    training.evaluate_and_print_results(**{name: given[name] for name in names} | own)
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

"""Flags of the learning-rate schedule that differ from those of the checkpoint that is continued.

Megatron 0.19 compares the numbers of its scheduler and of its parameter groups, each with an assertion of its own. The
flags they follow from are compared here, before it loads the optimizer.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_idft.errors import ChangedScheduleError

_RATES = ("lr", "min_lr")
_LENGTHS = ("train_iters", "train_samples", "global_batch_size", "lr_decay_iters", "lr_decay_samples")
_WARMUPS = ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples")
_OTHERS = ("lr_decay_style", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")


def check_schedule(args: argparse.Namespace, before: argparse.Namespace) -> None:
    """Compare the flags of this run with `before`, those of the checkpoint.

    Raises:
        ChangedScheduleError: the schedule differs.
    """
    if args.override_opt_param_scheduler or args.no_load_optim or args.skip_train:
        return
    # Megatron's parameter groups are found by their rates, whoever is to decide the schedule.
    rates = any(getattr(before, name, None) != getattr(args, name) for name in _RATES)
    if not rates and (args.use_checkpoint_opt_param_scheduler or _numbers(before) == _numbers(args)):
        return
    changed = [
        f"{_flag(name)}: {getattr(before, name, None)} in the checkpoint, {getattr(args, name)} now"
        for name in (*_RATES, *_LENGTHS, *_WARMUPS, *_OTHERS)
        if getattr(before, name, None) != getattr(args, name) and not _follows(name, args, before)
    ]
    keep = "" if rates else ", or --use-checkpoint-opt_param-scheduler to keep its schedule"
    raise ChangedScheduleError(
        f"--load {args.load} continues a training with another schedule: {'; '.join(changed)}. Pass the checkpoint's"
        f" values to go on as it was{keep}; --override-opt_param-scheduler goes on with the new ones; another --save"
        f" with --load {args.load} --finetune begins a new training with its weights"
    )


def take_new_rates(state: Any, args: argparse.Namespace, before: argparse.Namespace) -> None:
    """Write the rates of this run into the parameter groups of a loaded optimizer.

    Megatron's scheduler takes rates from the parameter groups, and these from the checkpoint, so without this
    --override-opt_param-scheduler would either not find them or be without effect.
    """
    if isinstance(state, dict):
        for group in state.get("param_groups", ()):
            for name, key in (("lr", "max_lr"), ("min_lr", "min_lr")):
                if isinstance(group, dict) and group.get(key) == getattr(before, name, None):
                    group[key] = getattr(args, name)
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            if isinstance(part, (dict, list)):
                take_new_rates(part, args, before)


def _numbers(args: argparse.Namespace) -> tuple[Any, ...]:
    """The values that Megatron's scheduler compares, as training.get_optimizer_param_scheduler computes them."""
    if args.train_samples:
        length, decay, warmup = args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
    else:
        numbers = (args.train_iters, args.lr_decay_iters, args.lr_warmup_iters)
        length, decay, warmup = ((number or 0) * args.global_batch_size for number in numbers)
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return (length, decay, warmup, *(getattr(args, name) for name in _OTHERS))


def _follows(name: str, args: argparse.Namespace, before: argparse.Namespace) -> bool:
    """Whether a length of decay is only that of training."""
    if name not in ("lr_decay_iters", "lr_decay_samples"):
        return False
    whole = name.replace("lr_decay", "train")
    return all(getattr(each, name, None) == getattr(each, whole, None) for each in (args, before))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

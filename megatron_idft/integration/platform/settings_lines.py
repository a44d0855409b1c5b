"""What a launch will do, in the few lines that a person reads before it begins."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def model_line(args: argparse.Namespace) -> str:
    """The model, its precision, and how it is laid out over the ranks. `args` are validated."""
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
    }
    # Megatron counts the data-parallel size without context parallelism, whose ranks share a batch.
    split = [f"{name} {size}" for name, size in sizes.items() if size > 1] + [f"DP {args.data_parallel_size}"]
    name = args.hf_model or args.load or args.pretrained_checkpoint or "random weights"
    ranks = f"{args.world_size} rank{'s' * (args.world_size > 1)}"
    return f"model: {name}, {str(args.params_dtype).removeprefix('torch.')}, on {ranks}: {', '.join(split)}"


def data_line(args: argparse.Namespace) -> str:
    limit = getattr(args, "limit", None)
    return f"data: {shortened(args.sft_data)}" + (f", the first {limit:,} records" if limit else "")


def shortened(paths: Sequence[str]) -> str:
    """The first files, and the number of the others."""
    names = ", ".join(Path(path).name if len(paths) > 1 else path for path in paths[:3])
    return names + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def training_lines(args: argparse.Namespace, unit: str, normalization: str) -> list[str]:
    """The settings of a training, just before its first step.

    Args:
        args: Megatron's, validated, with the length of the training.
        unit: what a sample is, in the plural.
        normalization: of the loss, in words.
    """
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    decay = f", {args.lr_decay_style} to {args.min_lr or 0:g}" if args.lr_decay_style != "constant" else ", constant"
    begins = f", from {args.iteration} on" if args.iteration else ""
    epochs = f", {args.train_epochs} epochs" if args.train_epochs else ""
    each = "" if args.eval_interval > args.train_iters else f" every {args.eval_interval} steps, and"
    saves = f" every {args.save_interval} steps and" if args.save_interval else ""
    return [
        model_line(args),
        data_line(args),
        f"batch: {args.global_batch_size} {unit} of {args.seq_length} tokens a step: {micro_batches} micro-batches of"
        f" {args.micro_batch_size} on each of {args.data_parallel_size} data-parallel ranks",
        f"steps: {args.train_iters}{begins}{epochs}; learning rate {args.lr:g}{decay}",
        f"loss: {args.sft_loss or 'cross-entropy, of Megatron'}"
        + (f", {normalization}" if args.calculate_per_token_loss else ""),
        f"evaluation:{each} at the end" if args.sft_valid_data else "evaluation: none (--sft-valid-data adds one)",
        f"checkpoints: {args.save},{saves} at the end" if args.save else "checkpoints: none, for want of --save",
    ]

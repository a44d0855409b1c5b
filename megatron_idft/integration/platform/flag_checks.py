"""Mistakes in Megatron's flags that Megatron finds late, or by an assertion: found right after parsing."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_idft.console import say
from megatron_idft.data.validation_sets import named_sets
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform.gpu_libraries import find_gpu_libraries
from megatron_idft.integration.platform.megatron_errors import NO_MODEL, ranks_needed, uneven_batch

_TRACKER = "latest_checkpointed_iteration.txt"


def check_files(flag: str, paths: Iterable[str]) -> None:
    """Refuse missing records before anything expensive starts.

    Raises:
        ArgumentError: names all records that are not there.
    """
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ArgumentError(f"{flag}: there is no {shown}. Pass paths that this machine sees")


def check_output(flag: str, folder: str) -> None:
    """Refuse a folder that cannot be made, or not be written, before anything expensive starts.

    Raises:
        ArgumentError: names the path that stands in the way.
    """
    path = Path(folder).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ArgumentError(f"{flag} {folder}: {nearest} is a file. Pass another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ArgumentError(f"{flag} {folder}: {nearest} may not be written by this user. Pass another folder")


def check_layout(args: argparse.Namespace) -> None:
    """Refuse a layout that the model or the ranks do not allow.

    The model first: a size that does not divide it is right with no number of ranks.

    Raises:
        ArgumentError: the parallel sizes do not divide the model, or the ranks cannot hold the layout.
    """
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {_flag(name): getattr(args, name) for name in names}
    if min(sizes.values()) < 1:
        raise ArgumentError("--tensor-model-parallel-size and the other sizes: pass whole numbers from 1")
    if not args.use_checkpoint_args and args.yaml_cfg is None:  # else the model is not known yet
        _check_divides(args)
    needed = math.prod(sizes.values())
    if args.tensor_parallel_num_weight_shards is None and args.world_size % needed:
        cuts = {flag: size for flag, size in sizes.items() if size > 1}
        planned = getattr(args, "gpus", None) is not None
        raise ArgumentError(ranks_needed(args.world_size, needed, cuts, planned=planned))


def _check_divides(args: argparse.Namespace) -> None:
    tensor, expert = "tensor_model_parallel_size", "expert_model_parallel_size"
    expert_tensor = "expert_tensor_parallel_size" if args.expert_tensor_parallel_size else tensor
    experts, pattern = args.num_experts, args.hybrid_layer_pattern or ""
    dense = "-" in pattern if pattern else not experts
    # The divided quantity, its field in config.json, and the size that must divide it.
    divided = [
        ("num_attention_heads", "num_attention_heads", "attention heads", tensor),
        ("ffn_hidden_size", "intermediate_size", "columns of the feed-forward layers", tensor if dense else None),
        ("moe_ffn_hidden_size", "moe_intermediate_size", "columns of each expert", expert_tensor if experts else None),
        ("num_experts", "num_experts", "experts", expert),
        ("padded_vocab_size", "vocab_size, padded", "rows of the vocabulary", tensor),
    ]
    for name, field, what, by in divided:
        number, size = getattr(args, name), 1 if by is None else getattr(args, by)
        if number and size and number % size:
            remedy = f"use a divisor of {number}"
            if name == "padded_vocab_size":
                remedy = f"pass --padded-vocab-size {-(-number // size) * size}, or another size"
            raise ArgumentError(
                f"{_flag(str(by))} {size} does not divide the {number} {what} of the model"
                f" ({_origin(args, name, field)}): {remedy}"
            )
    groups, size = args.num_query_groups, args.tensor_model_parallel_size
    if groups and args.group_query_attention and groups % size and size % groups:
        raise ArgumentError(
            f"--tensor-model-parallel-size {size} does not fit the {groups} query groups of the model"
            f" ({_origin(args, 'num_query_groups', 'num_key_value_heads')}): use a divisor or multiple of {groups}"
        )


def _origin(args: argparse.Namespace, name: str, field: str) -> str:
    """Where a number of the model stands: in config.json of --hf-model, with which flags must agree, or in a flag."""
    model = getattr(args, "hf_model", None)
    return _flag(name) if model is None else f"{field} of {Path(model) / 'config.json'}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_model(args: argparse.Namespace) -> None:
    """Refuse flags that describe no model.

    Raises:
        ArgumentError: a length that does not fit the model, or no model.
    """
    if args.use_checkpoint_args or args.yaml_cfg is not None:
        return  # the model is not known yet
    if args.num_layers is None and args.hybrid_layer_pattern is None and args.encoder_num_layers is None:
        raise ArgumentError(NO_MODEL)
    if args.seq_length is None and args.encoder_seq_length is None:
        raise ArgumentError("the length of a sequence is not known: pass --seq-length N, in tokens")
    if args.seq_length is not None and args.seq_length < 1:
        raise ArgumentError(f"--seq-length {args.seq_length}: pass a whole number from 1")
    positions, length = args.max_position_embeddings, args.seq_length
    if positions and length and length > positions:
        raise ArgumentError(
            f"--seq-length {length} is more than the {positions} positions of the model (--max-position-embeddings):"
            f" use at most {positions}, or a model with more"
        )


def check_logits(args: argparse.Namespace) -> None:
    """Refuse logits of another type than the model's where Transformer Engine is not used.

    tensor_parallel/layers.py of Megatron 0.20 takes such a product from there, and only from there.

    Raises:
        ArgumentError: names the flag.
    """
    asked = getattr(args, "logit_dtype", None)
    if asked is None or asked == ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"):
        return
    if args.cpu or not find_gpu_libraries(importing=False).transformer_engine:
        raise ArgumentError(
            f"--output-logit-dtype {asked} needs the matrix product of Transformer Engine, which is not in use here."
            " Drop it: --sft-loss sums in fp32 whatever the logits' dtype"
        )


def check_training(args: argparse.Namespace) -> None:
    """Refuse a training that could not begin, or would end late.

    Raises:
        ArgumentError: names the flags.
    """
    if args.micro_batch_size is None:
        raise ArgumentError("pass --micro-batch-size N, the sequences of a rank at a time")
    for name in (
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "log_interval",
        "save_interval",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: pass a whole number from 1")
    if args.eval_iters is not None and args.eval_iters < 0:
        raise ArgumentError(
            f"--eval-iters {args.eval_iters}: drop the flag to read all of --sft-valid-data, or pass how many batches"
            " of each set, 0 for none"
        )
    if not args.skip_train:
        if args.lr is None:
            raise ArgumentError("no learning rate: pass --lr, such as 1e-5")
        if not args.lr >= 0:
            raise ArgumentError(f"--lr {args.lr:g}: pass a number from 0, such as 1e-5")
        if args.min_lr > args.lr:
            raise ArgumentError(f"--min-lr {args.min_lr:g} is larger than --lr {args.lr:g}: pass a smaller --min-lr")
    warmup, length = args.lr_warmup_iters, args.lr_decay_iters or args.train_iters
    if length is not None and warmup >= length:
        raise ArgumentError(
            f"--lr-warmup-iters {warmup} is as long as the {length} iterations of the schedule: make it smaller, or"
            " train longer"
        )
    sharded, scheduled = args.tensor_parallel_num_weight_shards, args.step_batch_size_schedule
    if args.global_batch_size is not None and sharded is None and scheduled is None:
        data = args.world_size // (
            args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
        )
        if args.global_batch_size % (args.micro_batch_size * data):
            raise ArgumentError(uneven_batch(args.global_batch_size, args.micro_batch_size, data))


def check_start(args: argparse.Namespace) -> None:
    """Refuse a missing checkpoint to begin with: Megatron would take random weights.

    Raises:
        ArgumentError: a checkpoint is named and not there.
    """
    if (
        args.pretrained_checkpoint is not None
        and args.hf_model is None
        and not has_checkpoint(args.pretrained_checkpoint)
    ):
        raise ArgumentError(no_checkpoint("--pretrained-checkpoint", args.pretrained_checkpoint))
    elsewhere = args.load is not None and args.load != args.save
    alone = args.pretrained_checkpoint is None
    if elsewhere and (alone or args.finetune) and not has_checkpoint(args.load):
        raise ArgumentError(no_checkpoint("--load", args.load))


def has_checkpoint(folder: str) -> bool:
    """Whether Megatron would find a checkpoint there."""
    return (Path(folder) / _TRACKER).is_file()


def no_checkpoint(flag: str, folder: str) -> str:
    """The fault of the folder, and the folder that the flag wants."""
    if not Path(folder).exists():
        return f"{flag}: there is no folder {folder}. Pass one with a Megatron checkpoint"
    if (Path(folder) / "config.json").is_file():
        return f"{flag} {folder} is a Hugging Face folder: pass it as --hf-model, or `convert to-megatron` it first"
    if (Path(folder).parent / _TRACKER).is_file():
        return f"{flag} {folder}: pass the folder above it, {Path(folder).parent}; --ckpt-step N chooses an iteration"
    return f"{flag} {folder} holds no checkpoint (no {_TRACKER}): pass the --save folder of a training, or of `convert`"


def remarks(args: argparse.Namespace) -> list[str]:
    """Remarks on flags that are allowed in a training and hardly meant."""
    found = []
    if not args.skip_train and args.lr == 0:
        found.append("--lr 0: the model will not change")
    if not args.skip_train and args.save is None:
        found.append("no --save DIR: nothing of this training will be kept")
    return found


def check_train(args: argparse.Namespace, *, reads_records: bool) -> None:
    """Make all checks of `train`, the cheapest to mend first.

    Raises:
        ArgumentError: the first that fails.
    """
    check_model(args)
    check_training(args)
    check_start(args)
    check_files("--tokenizer-model", [args.tokenizer_model])
    if reads_records:
        check_files("--sft-data", args.sft_data)
        check_files(
            "--sft-valid-data", [path for paths in named_sets(args.sft_valid_data or ()).values() for path in paths]
        )
    if args.rank == 0:
        for remark in remarks(args):
            say(f"WARNING: {remark}")

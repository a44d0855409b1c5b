"""Training flags -> the inputs of `megatron_idft.planning`, by Megatron's own parser and checks.

No process group is made, no data and no checkpoint opened, no GPU touched: CPU mode answers what Megatron asks of
`torch.cuda` while it checks the flags.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.epochs import prepared_prefixes
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.arguments import validate_arguments
from megatron_idft.integration.loss.flags import compose_providers, wants_per_token_loss
from megatron_idft.integration.plan.arguments import add_plan_arguments
from megatron_idft.integration.plan.checks import (
    call,
    gpu_answers,
    model_config,
    refuse_uncounted,
)
from megatron_idft.integration.plan.shape import training_from
from megatron_idft.integration.platform import compatibility, cpu, flag_checks
from megatron_idft.integration.platform.gpu_libraries import find_gpu_libraries
from megatron_idft.integration.platform.hf_model import expand, recorded_vocab_size
from megatron_idft.integration.platform.local_flags import add_local_flags, given_flags
from megatron_idft.integration.training.arguments import add_data_arguments, validate_data_arguments
from megatron_idft.integration.training.data import named_data
from megatron_idft.planning.hardware import GIB, GPUS
from megatron_idft.planning.plan import Length, Plan, make_plan
from megatron_idft.planning.shape import Training
from megatron_idft.planning.throughput import Machine


@dataclass(frozen=True)
class Request:
    """A parsed command line.

    Attributes:
        args: Megatron's arguments with ours, validated.
        step_flops: of one global batch, by Megatron's own count.
        missing_environment: variables that the training wants and this process does not have.
    """

    args: argparse.Namespace
    training: Training
    step_flops: float
    missing_environment: tuple[str, ...]


def read_request(argv: Sequence[str]) -> Request:
    """Parse and check `argv`, the words after `plan`.

    Raises:
        ArgumentError, ConversionError: flags that training refuses too, or that `plan` does not count.
    """
    words = expand([word for word in argv if word != "--"])
    on_cpu = "--cpu" in words
    if not on_cpu:
        words = _with_local_flags(words)
    _prepare()
    if on_cpu:
        words = cpu.add_flags(words, "megatron-idft plan", announced=False)
    missing = _missing_environment(on_cpu)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = _parse(words, add_data_arguments)
    args.cpu = on_cpu
    true_vocab = _vocabulary(args)
    call("Megatron's model config", lambda: model_config(args))
    training = training_from(args, true_vocab)
    return Request(args, training, _step_flops(args), missing)


def plan_from_flags(argv: Sequence[str]) -> tuple[Plan, str | None]:
    """The plan of a command line, and the file that its JSON goes to.

    Raises:
        ArgumentError, PlanError, ConversionError: unusable flags.
    """
    request = read_request(argv)
    args = request.args
    plan = make_plan(
        request.training,
        machine_from(args),
        request.step_flops,
        length_from(args),
        request.missing_environment,
        args.layouts,
    )
    return plan, args.json


def machine_from(args: argparse.Namespace) -> Machine:
    """The GPU that the flags name; with --cpu processes, whose memory and peak are unknown unless given."""
    for name in ("gpus_per_node", "mfu", "disk_gb_per_s"):
        if getattr(args, name) <= 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: pass a number above 0")
    memory, peak, reserve, name = args.gpu_memory_gib, args.peak_tflops, args.reserve_gib, "GPU"
    if args.cpu:
        name, reserve = "CPU process", 0.5 if reserve is None else reserve
    else:
        known = GPUS[args.gpu]
        name = known.name if memory is None else name
        memory = known.memory_gib if memory is None else memory
        peak = known.peak_tflops if peak is None else peak
        reserve = 6.0 if reserve is None else reserve
    return Machine(
        name,
        args.gpus_per_node,
        None if memory is None else memory * GIB,
        None if peak is None else peak * 1e12,
        args.mfu,
        reserve * GIB,
        args.disk_gb_per_s * 1e9,
    )


def length_from(args: argparse.Namespace) -> Length:
    """Iterations, from flags or from the packs that `prepare` has made; records are not read."""
    if args.train_iters is not None:
        return Length(args.train_iters, f"{args.train_iters} iterations")
    if args.train_samples is not None:
        iterations = -(-args.train_samples // args.global_batch_size)
        return Length(iterations, f"{args.train_samples} sequences: {iterations} iterations")
    if args.train_epochs is None:
        return Length(None, "not given")
    packs = _packs(args)
    if packs is None:
        return Length(None, f"{args.train_epochs} epochs: iterations follow from the number of records")
    iterations = math.ceil(packs * args.train_epochs / args.global_batch_size)
    return Length(iterations, f"{args.train_epochs} epochs of {float(packs):.12g} packs: {iterations} iterations")


def _packs(args: argparse.Namespace) -> Fraction | None:
    """Packs of an epoch, as the PREFIX.json of each prefix says; None where --sft-data names records."""
    prefixes = prepared_prefixes(args.sft_data or ())
    if prefixes is None:
        return None
    found = Fraction(0)
    for prefix, weight in prefixes.items():
        found += int(json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["packs"]) * weight
    return found


def _prepare() -> None:
    """Make Megatron importable without a GPU and without Transformer Engine, as CPU mode does for training."""
    compatibility.check_megatron_origin()
    cpu.enable()
    from megatron_idft.integration.platform import local_layers  # noqa: PLC0415  imports Megatron

    local_layers.install()


def _with_local_flags(words: list[str]) -> list[str]:
    """`words` with the flags that training would add on this machine's GPU, unless they name layers themselves."""
    # Without a GPU, or where an earlier call of this process has hidden it, nobody knows what training will find.
    if "--transformer-impl" in given_flags(words) or not torch.cuda.is_available():
        return words
    return add_local_flags(words, "megatron-idft plan", find_gpu_libraries(importing=False))


def _missing_environment(on_cpu: bool) -> tuple[str, ...]:
    if on_cpu:
        return ()
    wanted = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF")
    return tuple(name for name in wanted if name not in os.environ)


def _parse(words: list[str], data_arguments: Any) -> argparse.Namespace:
    from megatron.training import arguments as megatron_arguments

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_plan_arguments(data_arguments(parser))

    before, sys.argv = sys.argv, ["megatron-idft plan", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parse = megatron_arguments.parse_args
            args: argparse.Namespace = parse(compose_providers(provider, wants_per_token_loss(words)))
    finally:
        sys.argv = before
    if args.use_checkpoint_args:
        raise ArgumentError(
            "plan opens no checkpoint: drop --use-checkpoint-args and pass the model's flags (beside a converted"
            " checkpoint they stand in model_flags.sh)"
        )
    if args.gpus is None or args.gpus < 1:
        raise ArgumentError("pass the number of GPUs: --gpus N (with --cpu, of processes)")
    backend = args.sft_loss_backend
    if backend == "triton" and not args.cpu:  # this machine need not be able to run it
        args.sft_loss_backend = "auto"
    validate_arguments(args)
    args.sft_loss_backend = backend or args.sft_loss_backend
    if args.sft_data:
        # A length that follows from the data is no reason to refuse here.
        call("the data flags", lambda: validate_data_arguments(args))
        named_data(args)
    args.world_size = args.gpus
    flag_checks.check_layout(args)
    flag_checks.check_model(args)
    with gpu_answers(args.cpu):
        call("Megatron", lambda: megatron_arguments.validate_args(args, {}))
    refuse_uncounted(args)
    return args


def _vocabulary(args: argparse.Namespace) -> int | None:
    """Sets args.padded_vocab_size as tokenizers/utils/build_tokenizer.py does; the true size where it is known."""
    true = args.sft_loss_vocab_size or recorded_vocab_size(args)
    if args.padded_vocab_size is None:
        size = _tokenizer_size(args) or args.vocab_size
        if size is None:
            raise ArgumentError(
                "the vocabulary is not known: pass --hf-model, --tokenizer-model with a folder or file that is here,"
                " --padded-vocab-size or --vocab-size"
            )
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size if args.pad_vocab_size else 1
        args.padded_vocab_size = -(-size // multiple) * multiple
        true = true or size
    return true or args.vocab_size


def _tokenizer_size(args: argparse.Namespace) -> int | None:
    """Of the tokenizer, if it is here. Scripts of others may say --vocab-size instead, and mean another class by it."""
    if args.tokenizer_model is None or not Path(args.tokenizer_model).exists():
        return None
    if args.vocab_size is not None and not args.sft_data:
        return None
    return load_tokenizer(args.tokenizer_model, args.chat_template, args.trust_remote_code).vocab_size


def _step_flops(args: argparse.Namespace) -> float:
    training: Any = importlib.import_module("megatron.training.training")
    return float(training.num_floating_point_operations(args, args.global_batch_size))

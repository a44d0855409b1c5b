"""Shared by the offline programs: Megatron's start without a training, and work taken from a ledger."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megatron_idft import console
from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.errors import ArgumentError
from megatron_idft.inference.captured_collectives import leave_graphs_unregistered
from megatron_idft.integration.loss.trainer import true_vocab_size
from megatron_idft.integration.platform import flag_checks, hf_model, signals
from megatron_idft.integration.platform.own_tokenizer import require_tokenizer, tokenizer_type
from megatron_idft.integration.platform.restricted_loading import restrict_checkpoint_reading
from megatron_idft.integration.platform.settings_lines import data_line, model_line
from megatron_idft.integration.training.checkpoints import RunCheckpoints
from megatron_idft.parsing import raise_errors
from megatron_idft.progress import Progress

Parser = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.25, 5.0  # doubled each time: the others may be about to finish
# Flags that keep Megatron from training work, and those that it insists on though nothing is trained.
_MEGATRON_DEFAULTS = {"micro_batch_size": 1, "no_load_optim": True, "no_load_rng": True, "skip_train": True}


class Terminated(SystemExit):
    """A signal: what was in flight is given back. No Exception, so what handles a record's errors lets it by."""


_terminated = 0  # the exit code, once a signal has come


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated, exit code 143, and Ctrl-C the same, exit code 130."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    signal.signal(signal.SIGINT, _raise_terminated)


def _raise_terminated(number: int, _: object) -> None:
    global _terminated
    if not _terminated and os.environ.get("LOCAL_RANK", "0") == "0":
        program, name = Path(sys.argv[0]).name, signals.name_of(number)
        text = f"stopped by {name}; the finished chunks stand, and the same command goes on from there"
        console.complain(f"{program}: {text}{console.where_log_is()}")
    _terminated = _terminated or signals.exit_code(number)
    raise Terminated(_terminated)


def parse(
    add_arguments: Parser,
    whole_numbers: Sequence[str],
    check: Callable[[argparse.Namespace], None] = lambda args: None,
) -> argparse.Namespace:
    """Megatron's arguments from `sys.argv` with those of `add_arguments`, checked; then `initialize_megatron`.

    Args:
        add_arguments: adds the program's flags to Megatron's parser.
        whole_numbers: names of arguments that must be at least 1 where they are given.
        check: sees the arguments before Megatron has validated them, and may raise ArgumentError.
    """
    from megatron.training import arguments as megatron_arguments
    from megatron.training.initialize import initialize_megatron

    restrict_checkpoint_reading()

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return raise_errors(add_arguments(parser))

    args: argparse.Namespace = megatron_arguments.parse_args(provider)
    if not args.sft_data or not args.output:
        raise ArgumentError("pass the records as --sft-data FILE [FILE …] and a folder as --output DIR")
    if args.load is None and args.pretrained_checkpoint is None:
        raise ArgumentError(
            "no model: pass a Hugging Face folder as --hf-model DIR, or its checkpoint as --load DIR with the model's"
            " flags as in training"
        )
    require_tokenizer(args)
    for name in ("limit", "chunk_records", *whole_numbers):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: pass a whole number from 1")
    check(args)
    flag_checks.check_layout(args)
    flag_checks.check_logits(args)
    flag_checks.check_model(args)
    flag_checks.check_files("--sft-data", args.sft_data)
    flag_checks.check_files("--tokenizer-model", [args.tokenizer_model])
    if not (args.dry_run or args.estimate):
        flag_checks.check_output("--output", args.output)
    if args.hf_model is None:
        _require_checkpoint(args)
    decodes = getattr(args, "calibrate", True) is not None  # realign always does
    if decodes and args.tensor_model_parallel_size > 1 and args.num_experts is None and torch.cuda.is_available():
        leave_graphs_unregistered(Path(sys.argv[0]).name)
    flags = [f"--{name.replace('_', '-')}" for name in _MEGATRON_DEFAULTS]
    sys.argv += ["--micro-batch-size", "1"] * (args.micro_batch_size is None)
    sys.argv += [flag for flag in (*flags[1:], "--exit-on-missing-checkpoint") if flag not in sys.argv]
    if "--distributed-timeout-minutes" not in " ".join(sys.argv):
        # Ranks wait for their leader, which may be verifying or writing; torchrun stops them where one dies.
        sys.argv += ["--distributed-timeout-minutes", "1440"]
    if args.tokenizer_type is None:
        sys.argv += ["--tokenizer-type", tokenizer_type(args.tokenizer_model)]
    args = megatron_arguments.parse_and_validate_args(provider)
    if args.sft_loss_vocab_size is None:
        args.sft_loss_vocab_size = hf_model.recorded_vocab_size(args)
    if args.rank == 0:
        for line in (model_line(args), data_line(args)):
            console.say(f"> {line}")
    if not (args.dry_run or args.estimate):
        console.keep_log(Path(args.output))
    initialize_megatron()
    return args


def _require_checkpoint(args: argparse.Namespace) -> None:
    """Megatron ends without an error where there is none."""
    named = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    given = {flag: folder for flag, folder in named.items() if folder is not None}
    if not any(flag_checks.has_checkpoint(folder) for folder in given.values()):
        raise ArgumentError("; ".join(flag_checks.no_checkpoint(flag, folder) for flag, folder in given.items()))


def load_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """The model that the flags name, with its weights; `args.sft_loss_vocab_size` is then the true vocabulary size."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.training import setup_model_and_optimizer

    hf_model.convert_before_loading(args)
    RunCheckpoints().verify_source(args)
    model_config = gpt_config_from_args(args) if args.hybrid_layer_pattern is None else hybrid_config_from_args(args)
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    args.sft_loss_vocab_size = true_vocab_size(args)
    return list(model)


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the model that must agree between launches. Layouts may differ: they change only rounding."""
    return {
        "model": str(Path(args.load or args.pretrained_checkpoint).resolve()),
        "hf_model": None if args.hf_model is None else Path(args.hf_model).resolve().name,
        "iteration": args.iteration,
        "precision": str(args.params_dtype),
        "vocab_size": args.sft_loss_vocab_size,
    }


def claimed(
    ledger: Ledger | None,
    share: Callable[[Any], Any],
    on_wait: Callable[[Sequence[int]], None],
    progress: Progress | None = None,
) -> Iterator[int]:
    """Chunks for this launch until all are finished. Waits for those that others hold.

    Args:
        ledger: of the leading rank, None on the others.
        share: the leader's value on every rank that takes part.
        on_wait: is told on the leader, while others work on all that is left, which chunks are finished.
        progress: shows whether this launch waits.
    """
    wait = _FIRST_POLL_SECONDS
    while True:
        if _terminated:  # it was raised where Python drops exceptions, such as in a destructor
            raise Terminated(_terminated)
        chunk = ledger.claim() if ledger is not None else None
        chunk, finished = share((chunk, ledger is not None and chunk is None and ledger.all_finished()))
        if progress is not None:
            progress.waits = chunk is None and not finished
        if finished:
            return
        if chunk is None:
            if ledger is not None:
                on_wait(ledger.finished())
            time.sleep(wait)
            wait = min(2 * wait, _LAST_POLL_SECONDS)
        else:
            yield chunk
            wait = _FIRST_POLL_SECONDS


def claims_from(first: int, ledger: Ledger | None, share: Callable[[Any], Any]) -> Callable[[], int | None]:
    """Asked again and again: this chunk, then others that are free at that moment; None while there are none.

    Args:
        first: is claimed already.
        ledger, share: see `claimed`.
    """
    begun = [first]

    def claim() -> int | None:
        if _terminated:
            raise Terminated(_terminated)
        chunk: int | None = begun.pop() if begun else share(ledger.claim() if ledger is not None else None)
        return chunk

    return claim


def write_part(path: Path, *, rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> None:
    """One chunk's rows as Parquet."""
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")

"""The flags of what `train` trains on: declared and checked in one place."""

from __future__ import annotations

import argparse

from megatron_idft.data import flags
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform import hf_model
from megatron_idft.integration.platform.own_tokenizer import require_tokenizer, tokenizer_type
from megatron_idft.integration.training import checkpoints, stops
from megatron_idft.integration.training.evaluation import add_evaluation_arguments, validate_evaluation_arguments

NEVER = 10**9  # an interval, in iterations, that no training reaches


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the chat data to Megatron's parser."""
    group = parser.add_argument_group(title="sft data")
    flags.add_data(
        group,
        f"Training records: {flags.DATA_HELP} Or packs that `prepare` has made, as PREFIX[:weight] …: an epoch visits"
        " each pack of a prefix `weight` times, by default once.",
    )
    add_evaluation_arguments(group)
    flags.add_last_turn_only(group)
    flags.add_template_date(group)
    group.add_argument(
        "--train-epochs",
        type=int,
        default=None,
        help="Passes over the training records, each record exactly once per pass. Instead of --train-iters.",
    )
    flags.add_truncation(group)
    flags.add_bad_records(group)
    flags.add_cache(group)
    group.add_argument(
        "--sft-packing",
        action="store_true",
        help="Pack the records: several whole conversations to a sequence, none of which sees another, as `prepare`"
        " does. An epoch then counts packs. By default each sequence is one record.",
    )
    checkpoints.add_checksum_argument(group)
    stops.add_signal_argument(group)
    hf_model.add_hf_model_arguments(group)
    hf_model.add_save_hf_argument(group)
    # A length that the data decides, unless the user does; and metrics with every step.
    parser.set_defaults(eval_iters=None, log_interval=1)
    return parser


def validate_data_arguments(args: argparse.Namespace) -> None:
    """Check the flags of `add_data_arguments` against each other and Megatron's.

    Raises:
        ArgumentError: flags that cannot be used; names the remedy.
    """
    if not args.sft_data:
        raise ArgumentError("no training records: pass --sft-data FILE [FILE …]")
    require_tokenizer(args)
    if args.train_epochs is not None:
        if args.train_iters is not None or args.train_samples is not None:
            raise ArgumentError("--train-epochs and --train-iters or --train-samples are two lengths: pass one of them")
        if args.train_epochs < 1:
            raise ArgumentError(f"--train-epochs {args.train_epochs}: pass a whole number from 1")
    elif args.train_iters is None and args.train_samples is None:
        raise ArgumentError("no length of training: pass --train-epochs, --train-iters or --train-samples")
    refusals = {
        "sft": "it reads another data format and needs Transformer Engine. Drop --sft; --sft-data is read without it",
        "mock_data": "drop --mock-data",
        "data_path": "the records come from --sft-data; drop --data-path",
        "full_validation": "every evaluation already reads all of --sft-valid-data; drop --full-validation",
        "multiple_validation_sets": "name the sets as --sft-valid-data NAME=FILE …; drop --multiple-validation-sets",
        "validation_set_names": "name the sets as --sft-valid-data NAME=FILE …; drop --validation-set-names",
        "hybrid_context_parallel": "it needs packed sequences; drop --hybrid-context-parallel",
        "dataloader_inter_document_masking": "documents are never mixed here; drop --dataloader-inter-document-masking",
        "overlap_moe_expert_parallel_comm": "this program does not build schedule plans; drop"
        " --overlap-moe-expert-parallel-comm, or use `run` with a script that does",
    }
    for name, why in refusals.items():
        if getattr(args, name, None):
            raise ArgumentError(f"--{name.replace('_', '-')} cannot be combined with --sft-data: {why}")
    if args.dataloader_type not in (None, "single"):
        raise ArgumentError(
            f"--dataloader-type {args.dataloader_type}: records are shuffled by --seed and epoch; drop the flag"
        )
    validate_evaluation_arguments(args)
    if args.save and args.save_interval is None:
        args.save_interval = NEVER  # once, after training
    if args.tokenizer_type is None:
        args.tokenizer_type = tokenizer_type(args.tokenizer_model)

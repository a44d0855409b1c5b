"""The flags of `train`, declared and checked in one place; those that other verbs have, too, are in data/flags.py."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_idft.data import flags
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform import hf_model
from megatron_idft.integration.platform.own_tokenizer import require_tokenizer, tokenizer_type
from megatron_idft.integration.training.normalization import MODES, validate_normalization

NEVER = 10**9  # an interval, in iterations, that no training reaches
MOST_SOURCES = 64  # of which metrics are kept without being asked


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the chat data to Megatron's parser."""
    group = parser.add_argument_group(title="sft data")
    flags.add_data(
        group,
        f"Training records: {flags.DATA_HELP} Or packs that `prepare` has made, as PREFIX[:weight] …: an epoch visits"
        " each pack of a prefix `weight` times, by default once.",
    )
    _add_evaluation(group)
    flags.add_last_turn_only(group)
    flags.add_prompt_weight(group)
    flags.add_template_date(group)
    flags.add_reference(group)
    flags.add_reference_top_k(
        group,
        "How many of the reference's most probable tokens objectives with a divergence from it use. Default: as"
        " many as `score` has kept, of other engines 20; of packs always all that they have.",
    )
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
    _add_normalization(group)
    _add_checksums(group)
    _add_signals(group)
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
    validate_normalization(args)
    if args.save and args.save_interval is None:
        args.save_interval = NEVER  # once, after training
    if args.tokenizer_type is None:
        args.tokenizer_type = tokenizer_type(args.tokenizer_model)


def _add_normalization(group: Any) -> None:
    group.add_argument(
        "--sft-normalization",
        nargs="+",
        metavar=f"{{{','.join(MODES)}}}[@ITERATION]",
        default=None,
        help="How the losses of a step's tokens make up its loss, whatever the layout. token: all trained tokens weigh"
        " the same. sample: all conversations do, each by the mean over its trained tokens. constant: their sum over a"
        " constant number of tokens for each sample of the batch. More words MODE@ITERATION switch after so many"
        " iterations: token sample@2000. `lm loss` stays per trained token, as do evaluations. Default token.",
    )
    group.add_argument(
        "--sft-normalization-constant",
        type=int,
        metavar="C",
        default=None,
        help="constant: the tokens that a sample counts for, however many of its tokens are trained. Default:"
        " --seq-length.",
    )


def _add_evaluation(group: Any) -> None:
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
    """Check the flags of validation sets and of keeping checkpoints against each other and Megatron's.

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


def _add_checksums(group: Any) -> None:
    group.add_argument(
        "--no-checkpoint-checksums",
        action="store_true",
        help="Neither sum the files of a checkpoint after it is saved nor compare the sums before it is loaded. Their"
        " sizes are still recorded and compared. Every rank reads back what it wrote: at 1 TB and 512 ranks 2 GB each.",
    )


def _add_signals(group: Any) -> None:
    group.add_argument(
        "--no-exit-signal-handler",
        dest="exit_signal_handler",
        action="store_false",
        help="End at once of SIGTERM, Ctrl-C or SIGHUP. Without this flag a run with --save finishes its step, saves a"
        " checkpoint and ends with exit code 143 (130 after Ctrl-C); torchrun waits --shutdown-timeout seconds for"
        " that (30) before it kills. A second Ctrl-C ends at once. 143 and 130 always mean that nothing is lost.",
    )
    group.set_defaults(exit_signal_handler=True)

"""The flags that mean the same in every offline program."""

from __future__ import annotations

from typing import Any

from megatron_idft.data import flags as record_flags
from megatron_idft.integration.platform import hf_model


def add_input_arguments(group: Any) -> None:
    """The flags that name records, output folder and model."""
    record_flags.add_data(group)
    group.add_argument(
        "--output",
        metavar="DIR",
        default=None,
        help="Where the results go. Any number of launches with the same settings may share it; a stopped one goes on.",
    )
    hf_model.add_hf_model_arguments(group)
    group.add_argument(
        "--no-checkpoint-checksums",
        action="store_true",
        help="Compare only the sizes of the checkpoint's files with its checksums.json, not their content.",
    )


def add_work_arguments(group: Any, *, chunk_records: int) -> None:
    """The flags of records, chunks and devices, which mean the same in every offline program."""
    group.add_argument("--limit", type=int, default=None, metavar="N", help="Take only the first N records.")
    group.add_argument(
        "--chunk-records",
        type=int,
        default=chunk_records,
        help="Records that a launch takes at a time; a killed one loses those that it has taken and not finished."
        f" Default {chunk_records}.",
    )
    group.add_argument(
        "--lease-seconds",
        type=float,
        default=120.0,
        help="A launch that gives no sign for so long has lost its chunk to the others. Default 120.",
    )
    record_flags.add_bad_records(group)
    record_flags.add_template_date(group)
    group.add_argument(
        "--sft-loss-vocab-size",
        type=int,
        default=None,
        help="Rows of the true vocabulary; columns above are Megatron's padding. Default: the tokenizer's size.",
    )
    group.add_argument("--cpu", action="store_true", help="Compute on the CPU with gloo even where a GPU is present.")

"""The flags of records, which mean the same in every verb: declared once, under one spelling.

`prepare` has a parser of its own; `train`, `score` and `realign` add them to Megatron's, where a name without a prefix
might one day be Megatron's own. The spellings that some verbs had before are accepted and not shown.
"""

from __future__ import annotations

import argparse
from typing import Any

_BEFORE = {
    "--sft-data": "--data",
    "--sft-truncation": "--truncation",
    "--sft-bad-records": "--bad-records",
    "--sft-last-turn-only": "--last-turn-only",
    "--sft-template-date": "--template-date",
    "--sft-cache": "--token-cache",
    "--sft-reference": "--reference",
    "--sft-reference-top-k": "--reference-top-k",
    "--sft-reference-dtype": "--reference-dtype",
}
DATA_HELP = (
    "JSONL (also .gz, .zst) or Parquet: `messages`, `prompt` and `response`, ShareGPT, Alpaca or prompt-completion."
)


def _add(group: Any, name: str, **options: Any) -> None:
    group.add_argument(name, **options)
    options |= {"dest": name[2:].replace("-", "_"), "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    group.add_argument(_BEFORE[name], **options)


def add_data(group: Any, help: str = f"Records: {DATA_HELP}") -> None:
    _add(group, "--sft-data", nargs="+", metavar="FILE", default=None, help=help)


def add_truncation(group: Any) -> None:
    _add(
        group,
        "--sft-truncation",
        choices=("truncate", "drop", "error"),
        default="truncate",
        help="What to do with a conversation longer than --seq-length: cut its end, leave it out, or stop. Counted and"
        " reported. Default truncate.",
    )


def add_bad_records(group: Any) -> None:
    _add(
        group,
        "--sft-bad-records",
        choices=("stop", "skip"),
        default="stop",
        help="What to do with a record that cannot be read: stop, naming file and line, or write it to an errors file"
        " and go on. Default stop.",
    )


def add_last_turn_only(group: Any) -> None:
    _add(
        group,
        "--sft-last-turn-only",
        action="store_true",
        help="Train the last assistant turn of each conversation only; the earlier ones are context. For corpora that"
        " repeat a conversation once for each of its turns, and for templates that edit earlier turns. `score` scores"
        " what training with this flag trains.",
    )


def add_prompt_weight(group: Any) -> None:
    group.add_argument(
        "--sft-prompt-weight",
        type=float,
        metavar="W",
        default=0.0,
        help="The weight in the loss of every user and system message that has no `loss` of its own, such as 0.2: their"
        " content, and the token that ends the message, where the template proves one. May be negative. Records with"
        " `token_ids` keep their mask. `score` scores what training with this flag trains. Default 0: only what the"
        " assistant says is trained.",
    )


def add_template_date(group: Any) -> None:
    _add(
        group,
        "--sft-template-date",
        metavar="YYYY-MM-DD",
        default=None,
        help="The date for chat templates that write today's: tokens must not depend on the day they are made. Without"
        " it such templates fall back to their fixed date, or are refused.",
    )


def add_cache(group: Any) -> None:
    _add(
        group,
        "--sft-cache",
        metavar="DIR",
        default=None,
        help="Where the tokenized records are kept, under a fingerprint of data, tokenizer, template and length."
        " Default: the folder `.megatron-idft-cache` beside the first file.",
    )


def add_reference(group: Any) -> None:
    _add(
        group,
        "--sft-reference",
        metavar="SCORES",
        default=None,
        help="What a reference model said of the trained tokens, kept beside them for objectives that compare with it:"
        " an --output folder of `score`, a file of another engine, or `records`, where the records hold it themselves."
        " Any model with the same tokenizer may be the reference. A trained token without its number is an error.",
    )
    _add(
        group,
        "--sft-reference-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="How log q, and what else is kept of the reference, is stored: in 4 bytes a token, or in 2 with a relative"
        " error of at most 2^-11 (log q of -10 is off by 0.004 at most, and q by 0.4 %%) and nothing below -65504."
        " Default float32.",
    )


def add_reference_top_k(group: Any, help: str) -> None:
    _add(group, "--sft-reference-top-k", type=int, metavar="K", default=None, help=help)

"""Looks at the data that a script under `run` trains on by Megatron's own flags, before Megatron starts."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_idft.errors import InputError

_BATCH = 1 << 24  # ids looked at together
_MOST = 1 << 30  # of a file
_LISTS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def check_script_data(args: argparse.Namespace) -> None:
    """Refuse token ids that the model has no row for. Called on rank 0.

    Training counts the labels of trained tokens; in a prompt, whose loss mask is 0, nothing else would find the fault.
    Files are read only where the tokenizer has such ids, or its size is not known, and only the first _MOST ids of a
    file, which takes seconds. A path that is no indexed dataset on this machine is left to the script.

    Raises:
        InputError: names prefix and sequence.
    """
    prefixes = {flag: found for flag, words in _data_words(args).items() if (found := list(filter(_is_there, words)))}
    rows = args.sft_loss_vocab_size
    if rows is None or not prefixes or ((size := _tokenizer_size(args.tokenizer_model)) is not None and size <= rows):
        return
    for flag, found in prefixes.items():
        for prefix in found:
            _require_rows(flag, prefix, rows)


def _data_words(args: argparse.Namespace) -> dict[str, list[str]]:
    """Flag -> the words of Megatron's blends: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX …"""
    words = {f"--{name.replace('_', '-')}": list(getattr(args, name) or ()) for name in _LISTS}
    if args.data_args_path:
        with suppress(OSError, ValueError):
            words["--data-args-path"] = Path(args.data_args_path).read_text(encoding="utf-8").split()
    if args.per_split_data_args_path:
        with suppress(OSError, ValueError, AttributeError, TypeError):
            splits = json.loads(Path(args.per_split_data_args_path).read_text(encoding="utf-8"))
            words["--per-split-data-args-path"] = [str(word) for split in splits.values() for word in split or ()]
    return words


def _is_there(prefix: str) -> bool:
    return all(Path(f"{prefix}{suffix}").is_file() for suffix in (".idx", ".bin"))


def _tokenizer_size(path: str | None) -> int | None:
    """One more than the largest id of a Hugging Face folder's tokenizer.json; None where there is none to read."""
    file = Path(path or "") / "tokenizer.json"
    if path is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1) + 1
    except Exception:  # tokenizers' own, which has no class: whoever uses the file tells
        return None


def _require_rows(flag: str, prefix: str, rows: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    index = IndexedDataset(prefix, mmap=True).index
    ids = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r") if Path(f"{prefix}.bin").stat().st_size else ()
    for begin in range(0, min(len(ids), _MOST), _BATCH):
        over = np.flatnonzero(np.asarray(ids[begin : begin + _BATCH]) >= rows)
        if len(over):
            place = begin + int(over[0])
            document = int(np.searchsorted(np.cumsum(index.sequence_lengths), place, side="right"))
            raise InputError(
                f"{flag} {prefix}: sequence {document} holds the token id {int(ids[place])}, but the model has {rows}"
                " rows: make the data with the tokenizer that the model was trained with; or give the model rows for"
                " its tokens in transformers (model.resize_token_embeddings(len(tokenizer))) and convert it again; or"
                " pass the right number of rows as --sft-loss-vocab-size"
            )

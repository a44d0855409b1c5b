"""The data of a run that trains on records: tokenizing them once, how many samples they are, Megatron's datasets."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.data.validation_sets import named_sets
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform.ranks import build_once

if TYPE_CHECKING:
    from megatron_idft.data.chat.tokenizer import ChatTokenizer
    from megatron_idft.data.dataset import ChatDataset, ShuffledEpochs
    from megatron_idft.data.token_cache import TokenCache


class RecordData:
    """The token caches of one run, built unless they are there. The same interface as `PackedData`."""

    unit = "records"

    def __init__(self, args: argparse.Namespace, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        self.train = _token_cache(args, tokenizer, "--sft-data", args.sft_data)
        self.valid = {
            name: _token_cache(args, tokenizer, f"--sft-valid-data {name}".rstrip(), paths)
            for name, paths in named_sets(args.sft_valid_data or ()).items()
        }

    @property
    def opened(self) -> list[TokenCache]:
        """Everything that is read."""
        return [self.train, *self.valid.values()]

    @property
    def fingerprint(self) -> str:
        """Of what the order of samples follows from."""
        return self.train.path.name

    @property
    def validation_sizes(self) -> dict[str, int]:
        """How many records each validation set has."""
        return {name: len(cache) for name, cache in self.valid.items()}

    @property
    def sources(self) -> list[str]:
        """The sources of all records."""
        return [name for cache in (self.train, *self.valid.values()) for name in cache.sources]

    @property
    def end_of_turn_ids(self) -> list[int]:
        return self.train.end_of_turn_ids

    def samples(self, epochs: int) -> int:
        """How many samples so many epochs are."""
        return epochs * len(self.train)

    def report(self) -> str:
        return "\n".join(cache.report() for cache in (self.train, *self.valid.values()))

    def first_document(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the first record."""
        return self.train[0]

    def datasets(
        self, args: argparse.Namespace, num_samples: int, vp_stage: int | None, sources: Mapping[str, int] | None
    ) -> tuple[ShuffledEpochs, dict[str, ChatDataset]]:
        """Training data and validation sets; every pipeline stage that reads any of a sample reads all of it.

        num_samples: of training. sources: a number for each of `sources`; None leaves them out of the samples.
        """
        from megatron_idft.data.dataset import ChatDataset, ShuffledEpochs

        shape = args.seq_length, self.tokenizer.pad_id
        train = ShuffledEpochs(
            ChatDataset(self.train, *shape, sources),
            seed=args.seed,
            num_samples=num_samples,
            num_epochs=args.train_epochs,
        )
        return train, {name: ChatDataset(cache, *shape, sources) for name, cache in self.valid.items()}


def _token_cache(args: argparse.Namespace, tokenizer: ChatTokenizer, flag: str, paths: Sequence[str]) -> TokenCache:
    from megatron_idft.data.token_cache import open_token_cache

    settings = {
        "tokenizer": tokenizer,
        "seq_length": args.seq_length,
        "cache_dir": args.sft_cache or str(Path(paths[0]).resolve().parent / ".megatron-idft-cache"),
        "truncation": args.sft_truncation,
        "on_bad_record": args.sft_bad_records,
        "last_turn_only": args.sft_last_turn_only,
    }
    build_shared_token_cache(flag, paths, settings)
    return open_token_cache(list(paths), **settings)


def build_shared_token_cache(name: str, paths: Sequence[str], settings: dict[str, Any]) -> None:
    """`build_token_cache` on one process per file system; afterwards every rank can open it."""
    from megatron_idft.data.token_cache import build_token_cache

    def build(progress: bool) -> None:
        try:
            build_token_cache(list(paths), progress=progress, **settings)
        except PermissionError as error:
            raise ArgumentError(f"the tokenized records cannot be kept ({error}): pass --sft-cache DIR") from error

    build_once(name, build)

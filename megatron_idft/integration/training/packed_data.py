"""The data of a run that trains on packs: opening the stores, how many samples they are, and Megatron's datasets."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_idft.data.packed.blend import Blend, BlendedEpochs, prepared_prefixes
from megatron_idft.data.packed.dataset import PackedDataset
from megatron_idft.data.validation_sets import named_sets
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.training.packed_batches import stage_reads, validate_packed_arguments

if TYPE_CHECKING:
    from megatron_idft.data.chat.tokenizer import ChatTokenizer
    from megatron_idft.data.packed.store import PackedStore

# What `prepare` has decided; the flag, and where it stands when nobody passed it.
_DECIDED = {"sft_truncation": "truncate", "sft_bad_records": "stop", "sft_cache": None, "sft_last_turn_only": False}


def prepared_data(args: argparse.Namespace) -> tuple[dict[str, Fraction], dict[str, list[str]]] | None:
    """(--sft-data as prefixes with weights, --sft-valid-data as prefixes by set); None where both are record files.

    Raises InputError or ArgumentError for mixtures, and for flags that have no effect on packs or cannot go with them.
    """
    train = prepared_prefixes(args.sft_data or ())
    valid = {name: prepared_prefixes(words) for name, words in named_sets(args.sft_valid_data or ()).items()}
    if train is None and not any(valid.values()):
        return None
    if train is None or None in valid.values():
        packed, records = ("--sft-data", "--sft-valid-data") if train else ("--sft-valid-data", "--sft-data")
        raise ArgumentError(
            f"{packed} is prepared data but {records} is not: a run trains and validates on packs or on records."
            f" Prepare {records} too"
        )
    for name, default in _DECIDED.items():
        if getattr(args, name, default) != default:
            raise ArgumentError(
                f"--{name.replace('_', '-')} has no effect on packs: `prepare` decided it. Drop it, or prepare again"
            )
    weighted = [prefix for each in valid.values() for prefix, weight in (each or {}).items() if weight != 1]
    if weighted:
        raise ArgumentError(f"--sft-valid-data {weighted[0]}: every pack is read once; drop the weight")
    validate_packed_arguments(args)
    return train, {name: list(prefixes or ()) for name, prefixes in valid.items()}


class PackedData:
    """The stores of one run. Opening maps them into memory; packs are read when they are trained. The same interface
    as `RecordData`.

    Args:
        args: Megatron's.
        tokenizer: must be the one that the data was prepared with; the stores refuse another.
        train: prefix -> weight. valid: name of a validation set -> prefixes.
    """

    unit = "packs"

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: ChatTokenizer,
        train: Mapping[str, Fraction],
        valid: Mapping[str, Sequence[str]],
    ):
        self.tokenizer, self.weights = tokenizer, list(train.values())
        self.train = {prefix: _open(args, tokenizer, prefix) for prefix in train}
        self.valid = {
            name: {prefix: _open(args, tokenizer, prefix) for prefix in prefixes} for name, prefixes in valid.items()
        }
        self.blend = Blend([len(store) for store in self.train.values()], self.weights, args.seed)

    @property
    def opened(self) -> list[PackedStore]:
        """Everything that is read."""
        return [*self.train.values(), *(store for stores in self.valid.values() for store in stores.values())]

    @property
    def fingerprint(self) -> str:
        """Of what the order of samples follows from: the prepared data and the weights."""
        parts = [
            (Path(prefix + ".json").read_text(), str(weight))
            for prefix, weight in zip(self.train, self.weights, strict=True)
        ]
        return "packs-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def validation_sizes(self) -> dict[str, int]:
        """How many packs each validation set has."""
        return {name: sum(map(len, stores.values())) for name, stores in self.valid.items()}

    @property
    def sources(self) -> list[str]:
        """The sources of all stores."""
        stores = [*self.train.values(), *(store for each in self.valid.values() for store in each.values())]
        return [name for store in stores for name in store.meta["sources"]]

    @property
    def end_of_turn_ids(self) -> list[int]:
        return sorted({i for store in self.train.values() for i in store.meta["end_of_turn_ids"]})

    def samples(self, epochs: int) -> int:
        """How many samples so many epochs of the blend are."""
        return self.blend.samples_before(epochs)

    def report(self) -> str:
        lines = [
            f"  {prefix}: {len(store):,} packs, weight {float(weight):g}"
            for (prefix, store), weight in zip(self.train.items(), self.weights, strict=True)
        ]
        for name, stores in self.valid.items():
            use = f"validation set {name}" if name else "validation"
            lines += [f"  {prefix}: {len(store):,} packs, for {use}" for prefix, store in stores.items()]
        return "\n".join(["> training from packs", *lines])

    def first_document(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the first document of the first pack."""
        pack = next(iter(self.train.values())).pack(0)
        end = int(pack.starts[1]) if len(pack.starts) > 1 else len(pack.ids)
        return pack.ids[:end], pack.mask[:end]

    def datasets(
        self, args: argparse.Namespace, num_samples: int, vp_stage: int | None, sources: Mapping[str, int] | None
    ) -> tuple[BlendedEpochs, dict[str, PackedDataset]]:
        """Training data and validation sets for this pipeline stage; what another stage needs is not read here.

        num_samples: of training. sources: a number for each of `sources`; None leaves them out of the samples.
        """
        inputs, labels = stage_reads(args, vp_stage)

        def numbers(stores: Mapping[str, PackedStore]) -> list[list[int]] | None:
            if sources is None:
                return None
            return [[sources[name] for name in store.meta["sources"]] for store in stores.values()]

        def dataset(stores: Mapping[str, PackedStore]) -> PackedDataset:
            return PackedDataset(
                stores,
                args.seq_length,
                self.tokenizer.pad_id,
                inputs=inputs,
                labels=labels,
                multiple_of=_multiple_of(args),
                sources=numbers(stores),
            )

        train = BlendedEpochs(
            dataset(self.train), self.weights, args.seed, num_samples=num_samples, num_epochs=args.train_epochs
        )
        return train, {name: dataset(stores) for name, stores in self.valid.items()}


def _open(args: argparse.Namespace, tokenizer: ChatTokenizer, prefix: str) -> PackedStore:
    from megatron_idft.data.packed.store import PackedStore

    store = PackedStore(prefix)
    store.require(tokenizer, args.seq_length, _multiple_of(args))
    return store


def _multiple_of(args: argparse.Namespace) -> int:
    """What documents are padded to: context parallelism over c ranks cuts each of them in 2 c parts."""
    return 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1

"""The data of a run that trains on packs: opening the stores, how many samples they are, and Megatron's datasets."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.data.blend import Blend, BlendedEpochs, prepared_prefixes
from megatron_idft.data.packed_dataset import PackedDataset
from megatron_idft.integration.arguments import ArgumentError
from megatron_idft.integration.packed_batches import stage_reads, validate_packed_arguments

if TYPE_CHECKING:
    from megatron_idft.data import ChatTokenizer
    from megatron_idft.data.packed import PackedStore

# What `prepare` has decided; the flag, and where it stands when nobody passed it.
_DECIDED = {"sft_truncation": "truncate", "sft_bad_records": "stop", "sft_cache": None, "sft_last_turn_only": False}


def prepared_data(args: argparse.Namespace) -> tuple[dict[str, Fraction], list[str]] | None:
    """(--sft-data as prefixes with weights, --sft-valid-data as prefixes); None where both are record files.

    Raises InputError or ArgumentError for mixtures, and for flags that have no effect on packs or cannot go with them.
    """
    train = prepared_prefixes(args.sft_data or ())
    valid = prepared_prefixes(args.sft_valid_data or ())
    if train is None and valid is None:
        return None
    if train is None or (valid is None and args.sft_valid_data):
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
    weighted = [prefix for prefix, weight in (valid or {}).items() if weight != 1]
    if weighted:
        raise ArgumentError(f"--sft-valid-data {weighted[0]}: every pack is read once; drop the weight")
    validate_packed_arguments(args)
    return train, list(valid or ())


class PackedData:
    """The stores of one run. Opening maps them into memory; packs are read when they are trained.

    Args:
        args: Megatron's.
        tokenizer: must be the one that the data was prepared with; the stores refuse another.
        train: prefix -> weight. valid: prefixes.
    """

    def __init__(
        self, args: argparse.Namespace, tokenizer: ChatTokenizer, train: Mapping[str, Fraction], valid: Sequence[str]
    ):
        self.tokenizer, self.weights = tokenizer, list(train.values())
        self.train = {prefix: _open(args, tokenizer, prefix) for prefix in train}
        self.valid = {prefix: _open(args, tokenizer, prefix) for prefix in valid}
        self.blend = Blend([len(store) for store in self.train.values()], self.weights, args.seed)

    @property
    def fingerprint(self) -> str:
        """Of what the order of samples follows from: the prepared data and the weights."""
        parts = [
            (Path(prefix + ".json").read_text(), str(weight))
            for prefix, weight in zip(self.train, self.weights, strict=True)
        ]
        return "packs-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def valid_packs(self) -> int:
        return sum(len(store) for store in self.valid.values())

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
        lines += [f"  {prefix}: {len(store):,} packs, for validation" for prefix, store in self.valid.items()]
        return "\n".join(["> training from packs", *lines])

    def first_document(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the first document of the first pack."""
        pack = next(iter(self.train.values())).pack(0)
        end = int(pack.starts[1]) if len(pack.starts) > 1 else len(pack.ids)
        return pack.ids[:end], pack.mask[:end]

    def datasets(self, args: argparse.Namespace, num_samples: Sequence[int], vp_stage: int | None) -> tuple:
        """(train, validation, no test set) for this pipeline stage; what another stage needs is not read here."""
        from megatron.core import mpu
        from megatron.core.datasets.utils import Split

        from megatron_idft.data import RepeatedRounds

        if mpu.get_tensor_model_parallel_rank() != 0:
            return None, None, None  # its batches come by broadcast
        inputs, labels = stage_reads(args, vp_stage)

        def dataset(stores: Mapping[str, PackedStore]) -> PackedDataset:
            return PackedDataset(
                stores,
                args.seq_length,
                self.tokenizer.pad_id,
                inputs=inputs,
                labels=labels,
                multiple_of=_multiple_of(args),
            )

        train = BlendedEpochs(
            dataset(self.train), self.weights, args.seed, num_samples=num_samples[0], num_epochs=args.train_epochs
        )
        valid: Any = None
        if self.valid:
            valid = RepeatedRounds(
                dataset(self.valid),  # type: ignore[arg-type]  # as a ChatDataset: indexed, with an untrained sample
                round_size=args.eval_iters * args.eval_global_batch_size,
                num_samples=num_samples[1],
            )
            valid.split = Split.valid  # Megatron then reads it with the evaluation's batch sizes
        return train, valid, None


def _open(args: argparse.Namespace, tokenizer: ChatTokenizer, prefix: str) -> PackedStore:
    from megatron_idft.data.packed import PackedStore

    store = PackedStore(prefix)
    store.require(tokenizer, args.seq_length, _multiple_of(args))
    return store


def _multiple_of(args: argparse.Namespace) -> int:
    """What documents are padded to: context parallelism over c ranks cuts each of them in 2 c parts."""
    return 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1

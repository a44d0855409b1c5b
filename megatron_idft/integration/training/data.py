"""The data of a run: record files tokenized once or packs that `prepare` has made, as Megatron's datasets."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed import summary
from megatron_idft.data.packed.dataset import PackedDataset, PackLimits
from megatron_idft.data.packed.epochs import Blend, BlendedEpochs, prepared_prefixes
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.records import TokenizedRecords, open_tokenized_records, tokenize_records
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings
from megatron_idft.data.validation_sets import named_sets
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform.ranks import build_once
from megatron_idft.integration.training.normalization import normalization_schedule
from megatron_idft.integration.training.packed_attention import stage_reads, validate_packed_arguments
from megatron_idft.integration.training.reference import reference_lines, reference_settings, sample_columns

# Settings that `prepare` has decided; the flag, and its value when nobody passed it.
_DECIDED = {
    "sft_truncation": "truncate",
    "sft_bad_records": "stop",
    "sft_cache": None,
    "sft_last_turn_only": False,
    "sft_prompt_weight": 0.0,
    "sft_packing": False,
    "sft_reference": None,
    "sft_reference_top_k": None,
    "sft_reference_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class NamedData:
    """The data that `--sft-data` and `--sft-valid-data` name.

    Attributes:
        prefixes: of the packs to train on, with their weights; None where the flags name record files.
        valid: name of a validation set -> prefixes of its packs, or its record files.
        packed: whether samples hold several documents.
    """

    prefixes: dict[str, Fraction] | None
    valid: dict[str, list[str]]
    packed: bool


def named_data(args: argparse.Namespace) -> NamedData:
    """The data that the flags name.

    Raises:
        InputError, ArgumentError: for mixtures of packs and records, and for flags that have no effect on packs or
            cannot go with them.
    """
    train = prepared_prefixes(args.sft_data or ())
    files = named_sets(args.sft_valid_data or ())
    valid = {name: prepared_prefixes(words) for name, words in files.items()}
    if train is None and not any(valid.values()):
        packing = getattr(args, "sft_packing", False)
        if packing:
            validate_packed_arguments(args)
        return NamedData(None, files, packing)
    if train is None or None in valid.values():
        packed, records = ("--sft-data", "--sft-valid-data") if train else ("--sft-valid-data", "--sft-data")
        raise ArgumentError(
            f"{packed} is prepared data but {records} is not: a run trains and validates on packs or on records."
            f" Prepare {records} too"
        )
    for name, default in _DECIDED.items():
        if getattr(args, name, default) != default:
            flag = f"--{name.replace('_', '-')} has no effect on packs:"
            if name == "sft_cache":
                raise ArgumentError(f"{flag} they need no cache. Drop it")
            raise ArgumentError(f"{flag} `prepare` decided it. Drop it, or prepare again")
    weighted = [prefix for each in valid.values() for prefix, weight in (each or {}).items() if weight != 1]
    if weighted:
        raise ArgumentError(f"--sft-valid-data {weighted[0]}: every pack is read once; drop the weight")
    validate_packed_arguments(args)
    return NamedData(train, {name: list(prefixes or ()) for name, prefixes in valid.items()}, packed=True)


class TrainingData:
    """The stores of one run. Opening maps them into memory; what a sample holds is read when it is trained.

    Args:
        args: Megatron's.
        tokenizer: must be the one that packs were prepared with; they refuse another.
        named: what the flags name.

    Attributes:
        packed: whether samples hold several documents.
        limits: of all packs, in training and validation; None where samples hold one document each.
        reference: the columns of a reference model that samples of training hold: those that the objective needs. None:
            it needs none, and none is read.
        normalizations: of the loss of each step.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: ChatTokenizer, named: NamedData):
        self.tokenizer, self.packed = tokenizer, named.packed
        self.train: dict[str, PackedStore]
        self.valid: dict[str, dict[str, PackedStore]]
        if named.prefixes is None:
            self.weights = [Fraction(1)]
            scores = reference_settings(args)
            self.train = {"--sft-data": shared_records(args, tokenizer, "--sft-data", args.sft_data, scores)}
            self.valid = {
                name: {name: shared_records(args, tokenizer, f"--sft-valid-data {name}".rstrip(), files)}
                for name, files in named.valid.items()
            }
        else:
            self.weights = list(named.prefixes.values())
            self.train = {prefix: _open(args, tokenizer, prefix) for prefix in named.prefixes}
            self.valid = {
                name: {prefix: _open(args, tokenizer, prefix) for prefix in prefixes}
                for name, prefixes in named.valid.items()
            }
        self.limits = _limits(args, self.opened) if self.packed else None
        self.reference = sample_columns(args, self.train)
        self._reference_lines = reference_lines(args, self.train, self.reference is not None)
        self.normalizations = normalization_schedule(args, self._tokens_per_conversation())
        self.blend = Blend([len(store) for store in self.train.values()], self.weights, args.seed)

    @property
    def unit(self) -> str:
        """The name of a sample."""
        return "packs" if self.packed else "records"

    @property
    def opened(self) -> list[PackedStore]:
        """Everything that is read."""
        return [*self.train.values(), *(store for stores in self.valid.values() for store in stores.values())]

    @property
    def fingerprint(self) -> str:
        """Of what the order of samples follows from: the data, how it was made, and the weights."""
        stores = zip(self.train.values(), self.weights, strict=True)
        parts = [(store.meta["settings"], str(weight)) for store, weight in stores]
        return "data-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def validation_sizes(self) -> dict[str, int]:
        """How many samples each validation set has."""
        return {name: sum(map(len, stores.values())) for name, stores in self.valid.items()}

    @property
    def sources(self) -> list[str]:
        """The sources of all stores."""
        return [name for store in self.opened for name in store.sources]

    @property
    def end_of_turn_ids(self) -> list[int]:
        return sorted({i for store in self.train.values() for i in store.end_of_turn_ids})

    @property
    def negative_tokens(self) -> int:
        """How many tokens of the training data have a negative weight."""
        return sum(store.meta.get("weights", {}).get("negative_tokens", 0) for store in self.train.values())

    def _tokens_per_conversation(self) -> int:
        """Trained ones of the training data, the average by the weights, rounded."""
        stores = list(zip(self.train.values(), self.weights, strict=True))
        trained = sum(weight * int(store.meta["counts"]["trained_tokens"]) for store, weight in stores)
        return max(1, round(trained / sum(weight * int(store.meta["documents"]) for store, weight in stores)))

    def samples(self, epochs: int) -> int:
        """How many samples so many epochs are."""
        return self.blend.samples_before(epochs)

    def report(self) -> str:
        records = [store.report() for store in self.opened if isinstance(store, TokenizedRecords)]
        if records:
            return "\n".join([*records, *self._reference_lines])
        lines = [
            f"  {prefix}: {len(store):,} packs, weight {float(weight):g}"
            for (prefix, store), weight in zip(self.train.items(), self.weights, strict=True)
        ]
        for name, stores in self.valid.items():
            use = f"validation set {name}" if name else "validation"
            lines += [f"  {prefix}: {len(store):,} packs, for {use}" for prefix, store in stores.items()]
        warnings = {prefix: summary.negative_mean(store.meta) for prefix, store in self.train.items()}
        lines += [f"  WARNING: {prefix}: {warning}" for prefix, warning in warnings.items() if warning]
        return "\n".join(["> training from packs", *lines, *self._reference_lines])

    def first_document(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights in the loss of the first document of the first pack."""
        pack = next(iter(self.train.values())).pack(0)
        tokens = pack.documents()[0]
        return pack.ids[tokens], pack.loss[tokens]

    def datasets(
        self, args: argparse.Namespace, num_samples: int, vp_stage: int | None, sources: Mapping[str, int] | None
    ) -> tuple[BlendedEpochs, dict[str, PackedDataset]]:
        """Training data and validation sets for this pipeline stage; what another stage needs is not read here.

        Args:
            args: Megatron's.
            num_samples: of training.
            vp_stage: the virtual stage.
            sources: a number for each of `sources`; None leaves them out of the samples.
        """
        inputs, labels = stage_reads(args, vp_stage)

        def numbers(stores: Mapping[str, PackedStore]) -> list[list[int]] | None:
            return None if sources is None else [[sources[name] for name in store.sources] for store in stores.values()]

        def dataset(
            stores: Mapping[str, PackedStore], reference: ReferenceColumns | None = None, conversations: bool = False
        ) -> PackedDataset:
            return PackedDataset(
                stores,
                args.seq_length,
                self.tokenizer.pad_id,
                inputs=inputs,
                labels=labels,
                bounds=self.packed,
                limits=self.limits,
                multiple_of=_multiple_of(args) if self.packed else 1,
                sources=numbers(stores),
                reference=reference,
                conversations=conversations,
            )

        trained = dataset(self.train, self.reference, self.normalizations.counts_conversations)
        train = BlendedEpochs(trained, self.weights, args.seed, num_samples=num_samples, num_epochs=args.train_epochs)
        return train, {name: dataset(stores) for name, stores in self.valid.items()}


def shared_records(
    args: argparse.Namespace,
    tokenizer: ChatTokenizer,
    flag: str,
    paths: Sequence[str],
    reference: ReferenceSettings | None = None,
) -> TokenizedRecords:
    """The records of `paths`, tokenized by one process per file system unless they are there, opened on every rank.

    Args:
        args: with the flags of records, see data/flags.py.
        tokenizer: of the model.
        flag: what names the files; unique in the process's life.
        paths: the files.
        reference: the scores of a reference model that are kept beside them.

    Raises:
        ArgumentError: the cache cannot be written.
    """
    packing = getattr(args, "sft_packing", False)
    settings = PrepareSettings(
        tuple(paths),
        args.seq_length,
        truncation=args.sft_truncation,
        bad_records=args.sft_bad_records,
        last_turn_only=args.sft_last_turn_only,
        prompt_weight=args.sft_prompt_weight,
        packing=packing,
        pad_multiple=_multiple_of(args) if packing else 1,
        reference=reference,
    )
    cache = args.sft_cache or str(Path(paths[0]).resolve().parent / ".megatron-idft-cache")

    def build(progress: bool) -> None:
        try:
            tokenize_records(settings, tokenizer, cache, progress=progress)
        except PermissionError as error:
            if error.filename in paths:
                raise
            raise ArgumentError(
                f"the tokenized records cannot be read or written ({error}): pass --sft-cache DIR"
            ) from error

    build_once(flag, build)
    return open_tokenized_records(settings, tokenizer, cache)


def _open(args: argparse.Namespace, tokenizer: ChatTokenizer, prefix: str) -> PackedStore:
    store = PackedStore(prefix)
    store.require(tokenizer, args.seq_length, _multiple_of(args))
    return store


def _limits(args: argparse.Namespace, stores: Sequence[PackedStore]) -> PackLimits:
    """Read from the files, which all ranks share."""
    return PackLimits(
        max(store.most_documents() for store in stores),
        max(store.longest_document(_multiple_of(args)) for store in stores),
    )


def _multiple_of(args: argparse.Namespace) -> int:
    """The multiple that documents are padded to: context parallelism over c ranks cuts each of them in 2 c parts."""
    return 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1

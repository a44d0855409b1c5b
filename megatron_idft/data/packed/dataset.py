"""Training samples from packs: the documents of a sequence, each of them trained as if it were alone."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_idft.data.reference.columns import KEYS, ReferenceColumns
from megatron_idft.errors import InputError

IGNORED_LABEL = -100
NO_SOURCE = -1
Sample = dict[str, torch.Tensor]

INPUTS = ("tokens", "position_ids")
LABELS = ("labels", "loss_mask")


class Pack(Protocol):
    """Documents one after the other: `starts` [documents] says where each begins, the last ends at len(ids).

    sources: [documents], the number of each document's source in its reader.
    reference: the columns of a reference model, each [len(ids)] or [len(ids), K]; read only where samples hold them.
    """

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def mask(self) -> NDArray[np.uint8]: ...
    @property
    def weights(self) -> NDArray[np.float32] | None: ...
    @property
    def starts(self) -> NDArray[np.int32]: ...
    @property
    def sources(self) -> NDArray[np.int32]: ...
    @property
    def reference(self) -> Mapping[str, NDArray[Any]]: ...


class PackReader(Protocol):
    """The interface of a store of packs. Its arrays may be memory-mapped: only what a sample holds is read."""

    def __len__(self) -> int: ...
    def pack(self, index: int, /) -> Pack: ...


@dataclass(frozen=True, slots=True)
class PackLimits:
    """What no pack of a run exceeds: samples and kernels have one shape in the whole run, as CUDA graphs want it.

    Attributes:
        most_documents: of a pack.
        longest_document: in positions, with its padding.
    """

    most_documents: int
    longest_document: int

    def num_bounds(self, seq_length: int) -> int:
        """Of a sample: 0, the end of each document, and those of its padding, which is cut into such as are allowed."""
        return 1 + self.most_documents + -(-seq_length // self.longest_document)


class PackedDataset(Dataset[Sample]):
    """The packs of one or more readers, numbered through, padded on the right.

    A document of n ids takes n - 1 positions: its last token is only a label. The first token
    of a document is never a label, so no label crosses a border. The rest of the sequence is padding, in documents no
    longer than the longest of the run. A sample holds, of shape [seq_length] unless said otherwise:

        bounds        int32    (bounds) [limits.num_bounds] 0, then the end of each document, then seq_length repeated
        tokens        int64    (inputs) the documents' ids[:-1], and pad_id
        position_ids  int64    (inputs) 0, 1, … within each document; without `bounds` in the whole sequence
        labels        int64    (labels) the documents' ids[1:] where trained, else -100
        loss_mask     float32  (labels) the token's weight where trained (1 where the reader gives none), else 0
        sources       int64    (labels, and only with `sources`) the number of the document's source, -1 in padding
        reference_…            (labels, and only with `reference`) its columns, float32 or, of ids, int32, [seq_length]
                               or [seq_length, K]; 0 where not trained
        conversation_tokens
                      int32    (labels, and only with `conversations`) where trained, how many tokens of the document
                               are; negative at the first of these, so that ranks that share a document count it once

    Args:
        readers: name, for messages -> reader.
        inputs, labels: whether samples hold these. A pipeline stage with neither end of the model needs the bounds
            only, and then no id, mask or weight is read.
        bounds: whether samples hold these. Where each pack is one document, nobody needs them: attention is causal,
            so padding on the right is seen by nobody.
        limits: of all packs of the run; None allows whatever a sequence could hold.
        multiple_of: every document is padded to a multiple of so many positions; context parallelism over c ranks
            cuts each document in 2 c parts.
        sources: for each reader its sources' numbers through all readers, by their numbers in the reader.
        reference: the columns of a reference model that samples hold. Every reader must have them; of its most probable
            tokens it may have more.
        conversations: whether samples hold conversation_tokens.

    Raises:
        InputError: from `[]`, when a pack does not fit in seq_length.
    """

    def __init__(
        self,
        readers: Mapping[str, PackReader],
        seq_length: int,
        pad_id: int,
        *,
        inputs: bool = True,
        labels: bool = True,
        bounds: bool = True,
        limits: PackLimits | None = None,
        multiple_of: int = 1,
        sources: Sequence[Sequence[int]] | None = None,
        reference: ReferenceColumns | None = None,
        conversations: bool = False,
    ):
        self.conversations = conversations
        self.readers, self.seq_length, self.pad_id = dict(readers), seq_length, pad_id
        self.inputs, self.labels, self.bounds, self.multiple_of = inputs, labels, bounds, multiple_of
        self.limits = limits or PackLimits(seq_length - 1, seq_length)
        self.reference = reference
        self._sources = [np.array(numbers, dtype=np.int64) for numbers in sources or ()]
        self.sizes = [len(reader) for reader in self.readers.values()]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        name = list(self.readers)[which]
        number = index - (self._ends[which] - self.sizes[which])
        pack = self.readers[name].pack(number)
        starts = np.asarray(pack.starts, dtype=np.int64)
        lengths = np.diff(starts, append=len(pack.ids)) - 1  # of the inputs
        ends = np.cumsum(-(-lengths // self.multiple_of) * self.multiple_of)
        if ends[-1] > self.seq_length:
            raise InputError(
                f"{name}: pack {number} takes {ends[-1]} positions with every document padded to a multiple of"
                f" {self.multiple_of}, more than --seq-length {self.seq_length}. Prepare the data with this"
                f" --seq-length and --pad-multiple {self.multiple_of}"
            )
        sources = self._sources[which][pack.sources] if self.labels and self._sources else None
        return self._sample(pack, starts, lengths, ends, sources)

    def untrained_sample(self) -> Sample:
        """A sample of padding only. It fills up a batch and counts for nothing in a mean over trained tokens."""
        none = np.empty(0, dtype=np.int64)
        return self._sample(None, none, none, none, none)

    def _sample(
        self,
        pack: Pack | None,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ends: NDArray[np.int64],
        sources: NDArray[np.int64] | None,
    ) -> Sample:
        bounds = np.full(self.limits.num_bounds(self.seq_length), self.seq_length, dtype=np.int32)
        bounds[0] = 0
        bounds[1 : len(ends) + 1] = ends
        padding = np.arange(bounds[len(ends)], self.seq_length, self.limits.longest_document)[1:]
        bounds[len(ends) + 1 :][: len(padding)] = padding
        sample = {"bounds": torch.from_numpy(bounds)} if self.bounds else {}
        begins = bounds[: len(ends)].astype(np.int64)
        # Where the ids of all documents stand in the pack, and where they go in the sequence.
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source, target = np.repeat(starts, lengths) + within, np.repeat(begins, lengths) + within
        if self.inputs:
            tokens = np.full(self.seq_length, self.pad_id, dtype=np.int64)
            if pack is not None:
                tokens[target] = pack.ids[source]
            positions = np.arange(self.seq_length)
            if self.bounds:
                positions -= bounds[np.searchsorted(bounds, positions, side="right") - 1]
            sample["tokens"] = torch.from_numpy(tokens)
            sample["position_ids"] = torch.from_numpy(positions)
        if self.labels:
            labels = np.full(self.seq_length, IGNORED_LABEL, dtype=np.int64)
            loss_mask = np.zeros(self.seq_length, dtype=np.float32)
            counts = np.zeros(self.seq_length, dtype=np.int32)
            if pack is not None:
                trained = pack.mask[source + 1].astype(bool)
                source, target = source[trained] + 1, target[trained]
                labels[target] = pack.ids[source]
                loss_mask[target] = 1 if pack.weights is None else pack.weights[source]
                if self.conversations:
                    counts[target] = _marked_counts(np.repeat(np.arange(len(lengths)), lengths)[trained])
            sample["labels"] = torch.from_numpy(labels)
            sample["loss_mask"] = torch.from_numpy(loss_mask)
            if self.conversations:
                sample["conversation_tokens"] = torch.from_numpy(counts)
            for name, shape in self.reference.shapes.items() if self.reference else ():
                column = np.zeros((self.seq_length, *shape), dtype=np.int32 if name == "top_ids" else np.float32)
                if pack is not None:
                    first_k: Any = tuple(map(slice, shape))
                    column[target] = pack.reference[name][(source, *first_k)]
                sample[KEYS[name]] = torch.from_numpy(column)
        if self.labels and self._sources and sources is not None:
            numbers = np.full(self.seq_length, NO_SOURCE, dtype=np.int64)
            taken = np.diff(ends, prepend=0)
            numbers[: taken.sum()] = np.repeat(sources, taken)
            sample["sources"] = torch.from_numpy(numbers)
        return sample


def _marked_counts(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """`conversation_tokens` of trained tokens, from the numbers of their documents, which ascend."""
    counts = np.bincount(documents)[documents]
    return np.where(np.diff(documents, prepend=-1) > 0, -counts, counts)


class IndexedSamples(Protocol):
    """A dataset that can fill up a batch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def untrained_sample(self) -> Sample: ...


class RepeatedRounds(Dataset[Sample]):
    """The same samples over and over, in order: each round of an evaluation reads one set after the other.

    Args:
        sets: datasets, and how many samples of each a round has. A set with fewer is filled up with untrained samples,
            so it is read exactly once.
        num_samples: at least this many, in whole rounds.
    """

    def __init__(self, sets: Sequence[tuple[IndexedSamples, int]], num_samples: int):
        if not sets or min(size for _, size in sets) < 1:
            raise ValueError(f"every set needs at least one sample in a round, got {[size for _, size in sets]}")
        self.datasets = [dataset for dataset, _ in sets]
        self._ends = list(accumulate(size for _, size in sets))
        self.num_samples = -(-num_samples // self._ends[-1]) * self._ends[-1]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        index %= self._ends[-1]
        which = bisect_right(self._ends, index)
        dataset, record = self.datasets[which], index - (self._ends[which - 1] if which else 0)
        return dataset[record] if record < len(dataset) else dataset.untrained_sample()

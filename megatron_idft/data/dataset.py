"""Padded training samples over a token cache, and epochs in an order that is a pure function of seed and position."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_idft.data.token_cache import TokenCache

IGNORED_LABEL = -100
NO_SOURCE = -1

Sample = dict[str, torch.Tensor]


class ChatDataset(Dataset[Sample]):
    """One conversation per sample, padded on the right. Attention is causal, so padding needs no mask.

    A sample holds, each of shape [seq_length]:
        tokens        int64    ids[:-1], then pad_id
        labels        int64    ids[1:] where trained, else -100
        loss_mask     float32  what the label weighs in the loss: 0 where it is not trained, else mostly 1
        position_ids  int64    0 … seq_length - 1
        sources       int64    only with `sources`, and of shape [1]: the number of the record's source

    sources: a number for each of the cache's sources, by name.

    Raises ValueError when the cache holds longer records than seq_length: they would be cut uncounted.
    """

    def __init__(self, cache: TokenCache, seq_length: int, pad_id: int, sources: Mapping[str, int] | None = None):
        if cache.seq_length > seq_length:
            raise ValueError(
                f"the token cache was cut to seq_length {cache.seq_length}, more than {seq_length}: build it again"
            )
        self.cache, self.seq_length, self.pad_id = cache, seq_length, pad_id
        self._sources = None if sources is None else [sources[name] for name in cache.sources]

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.cache[index]
        weights = self.cache.weights(index)
        n = len(ids) - 1
        trained = np.zeros(self.seq_length, dtype=bool)
        trained[:n] = mask[1:]
        tokens = np.full(self.seq_length, self.pad_id, dtype=np.int64)
        tokens[:n] = ids[:-1]
        labels = np.full(self.seq_length, IGNORED_LABEL, dtype=np.int64)
        labels[:n][trained[:n]] = ids[1:][trained[:n]]
        loss_mask = trained.astype(np.float32)
        if weights is not None:
            loss_mask[:n] = weights[1:]
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.arange(self.seq_length, dtype=torch.int64),
        } | self._source(index)

    def untrained_sample(self) -> Sample:
        """A sample of padding only. It fills up a batch and counts for nothing in a mean over trained tokens."""
        return {
            "tokens": torch.full((self.seq_length,), self.pad_id, dtype=torch.int64),
            "labels": torch.full((self.seq_length,), IGNORED_LABEL, dtype=torch.int64),
            "loss_mask": torch.zeros(self.seq_length, dtype=torch.float32),
            "position_ids": torch.arange(self.seq_length, dtype=torch.int64),
        } | self._source(None)

    def _source(self, index: int | None) -> Sample:
        if self._sources is None:
            return {}
        return {"sources": torch.tensor([NO_SOURCE if index is None else self._sources[self.cache.source(index)]])}


class ShuffledEpochs(Dataset[Sample]):
    """`num_samples` samples of `dataset` in whole epochs, each an independent shuffle that visits every record once.

    Sample i is a pure function of (seed, i): a resumed run, on any number of ranks, continues where it was. Only the
    permutation of the epoch in use is held (8 bytes per record; three times that while it is drawn).

    num_epochs: after so many epochs, untrained samples fill up the last batch; None goes on shuffling.
    """

    def __init__(self, dataset: ChatDataset, seed: int, num_samples: int, num_epochs: int | None = None):
        self.dataset, self.seed, self.num_samples, self.num_epochs = dataset, seed, num_samples, num_epochs
        self.records = len(dataset)
        if self.records == 0 or num_samples < 0:
            raise ValueError(f"cannot draw {num_samples} samples from {self.records} records")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        record = self.record_index(index)
        return self.dataset.untrained_sample() if record is None else self.dataset[record]

    def record_index(self, index: int) -> int | None:
        """Which record sample `index` is; None behind the last epoch. Raises IndexError outside [0, num_samples)."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, position = divmod(index, self.records)
        if self.num_epochs is not None and epoch >= self.num_epochs:
            return None
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.records, self.seed, epoch)
        return int(self._order[position])


class IndexedSamples(Protocol):
    """A dataset that can fill up a batch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def untrained_sample(self) -> Sample: ...


class RepeatedRounds(Dataset[Sample]):
    """The same samples over and over, in order: each round of an evaluation reads one set behind the other.

    sets: datasets, and how many samples of each a round has. A set with fewer is filled up with untrained samples, so
        it is read exactly once.
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


def shuffled(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 [n].

    Sorted random keys rather than `Generator.permutation`: numpy promises the same raw bits of Philox in every
    release, but not the same permutation, and a run may be resumed in another container.
    """
    keys = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n)
    return np.argsort(keys, kind="stable")

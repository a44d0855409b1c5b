"""Padded training samples over a token cache, and epochs in an order that is a pure function of seed and position."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_idft.data.token_cache import TokenCache

IGNORED_LABEL = -100

Sample = dict[str, torch.Tensor]


class ChatDataset(Dataset[Sample]):
    """One conversation per sample, padded on the right. Attention is causal, so padding needs no mask.

    A sample holds, each of shape [seq_length]:
        tokens        int64    ids[:-1], then pad_id
        labels        int64    ids[1:] where trained, else -100
        loss_mask     float32  1 where the label is trained, else 0
        position_ids  int64    0 … seq_length - 1

    Raises ValueError when the cache holds longer records than seq_length: they would be cut uncounted.
    """

    def __init__(self, cache: TokenCache, seq_length: int, pad_id: int):
        if cache.seq_length > seq_length:
            raise ValueError(
                f"the token cache was cut to seq_length {cache.seq_length}, more than {seq_length}: build it again"
            )
        self.cache, self.seq_length, self.pad_id = cache, seq_length, pad_id

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.cache[index]
        n = len(ids) - 1
        trained = np.zeros(self.seq_length, dtype=bool)
        trained[:n] = mask[1:]
        tokens = np.full(self.seq_length, self.pad_id, dtype=np.int64)
        tokens[:n] = ids[:-1]
        labels = np.full(self.seq_length, IGNORED_LABEL, dtype=np.int64)
        labels[:n][trained[:n]] = ids[1:][trained[:n]]
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(trained.astype(np.float32)),
            "position_ids": torch.arange(self.seq_length, dtype=torch.int64),
        }


class ShuffledEpochs(Dataset[Sample]):
    """`num_samples` samples of `dataset` in whole epochs, each an independent shuffle that visits every record once.

    Sample i is a pure function of (seed, i): a resumed run, on any number of ranks, continues where it was. Only the
    permutation of the epoch in use is held (8 bytes per record; three times that while it is drawn).
    """

    def __init__(self, dataset: Dataset[Sample], seed: int, num_samples: int):
        self.dataset, self.seed, self.num_samples = dataset, seed, num_samples
        self.records = len(dataset)  # type: ignore[arg-type]
        if self.records == 0 or num_samples < 0:
            raise ValueError(f"cannot draw {num_samples} samples from {self.records} records")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.record_index(index)]

    def record_index(self, index: int) -> int:
        """Which record sample `index` is. Raises IndexError outside [0, num_samples)."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, position = divmod(index, self.records)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.records, self.seed, epoch)
        return int(self._order[position])


def shuffled(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 [n].

    Sorted random keys rather than `Generator.permutation`: numpy promises the same raw bits of Philox in every
    release, but not the same permutation, and a run may be resumed in another container.
    """
    keys = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(n)
    return np.argsort(keys, kind="stable")

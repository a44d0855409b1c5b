"""The order of samples: shuffled epochs, mixed by weights; exact, and a pure function of seed and position.

The rule. A source of n packs with weight w gives floor((e + 1) w n) - floor(e w n) packs to epoch e = 0, 1, …: the next
ones of an endless row of its own, made of rounds, each a shuffle that visits every pack of the source once. The epoch
is a shuffle of what its sources give. So after any number e of epochs every pack was visited floor(e w) or ceil(e w)
times, and weight 1 (the default) visits each pack exactly once per epoch. Weights are read as decimals: 0.1 is one
tenth.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_idft.data.packed.dataset import PackedDataset, Sample
from megatron_idft.data.packed.packing import permutation
from megatron_idft.errors import InputError


def prepared_prefixes(words: Sequence[str]) -> dict[str, Fraction] | None:
    """`PREFIX[:weight] …` -> prefix and weight of each; None where no word names prepared data.

    Prepared data is known by its file PREFIX.json.

    Raises:
        InputError: a mixture with record files, a weight that is no positive number, or a prefix that is named twice.
    """
    prefixes: dict[str, Fraction] = {}
    others = []
    for word in words:
        prefix, colon, weight = (word, "", "") if _is_prepared(word) else word.rpartition(":")
        if not _is_prepared(prefix):
            others.append(word)
            continue
        if prefix in prefixes:
            raise InputError(f"{prefix} is named twice: name it once, with the sum of the weights")
        prefixes[prefix] = _weight(word, weight) if colon else Fraction(1)
    if prefixes and others:
        raise InputError(
            f"{', '.join(prefixes)} is prepared data but {', '.join(others)} is not: a run trains on packs or on"
            " records. Prepare all of it (a prefix is known by its file PREFIX.json), or pass the records of both"
        )
    return prefixes or None


def _is_prepared(prefix: str) -> bool:
    return bool(prefix) and Path(prefix + ".json").is_file()


def _weight(word: str, text: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise InputError(f"{word}: {text!r} is no weight. Pass a number above 0, such as {word.rpartition(':')[0]}:0.5")
    return weight


class Blend:
    """Which pack each sample is. Only the order of the epoch in use is held: 8 bytes per pack of it.

    Args:
        sizes, weights: packs and weight of each source. Packs are numbered through all sources.
        seed: of all shuffles.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], seed: int):
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError(f"every source needs packs and a weight above 0, got {sizes} and {weights}")
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self._mean = sum(size * weight for size, weight in zip(sizes, weights, strict=True))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def samples_before(self, epoch: int) -> int:
        """How many samples the epochs 0 … epoch - 1 have."""
        return sum(self._given(source, epoch) for source in range(len(self.sizes)))

    def pack(self, index: int) -> tuple[int, int]:
        """Sample `index` (from 0) -> (its epoch, the number of its pack)."""
        # The sources' floors leave out less than one sample each.
        epoch = math.floor(index / self._mean)
        while self.samples_before(epoch + 1) <= index:
            epoch += 1
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return epoch, int(self._order[index - self.samples_before(epoch)])

    def _given(self, source: int, epochs: int) -> int:
        return math.floor(epochs * self.weights[source] * self.sizes[source])

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        packs, first = [], 0
        for source, size in enumerate(self.sizes):
            start, end = self._given(source, epoch), self._given(source, epoch + 1)
            for number in range(start // size, -(-end // size)):
                # Every shuffle has a stream of its own: 0 is the blend's, then the sources'.
                order = permutation(size, self.seed, (source + 1) << 40 | number)
                packs.append(first + order[max(start - number * size, 0) : end - number * size])
            first += size
        together = np.concatenate(packs)
        return together[permutation(len(together), self.seed, epoch)]


class BlendedEpochs(Dataset[Sample]):
    """`num_samples` samples of `dataset`, in the order of a `Blend`.

    A resumed run, on any number of ranks, continues where it was. Nothing is read before the first sample.

    Args:
        num_epochs: after so many epochs, untrained samples fill up the last batch; None goes on.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        weights: Sequence[Fraction],
        seed: int,
        num_samples: int,
        num_epochs: int | None = None,
    ):
        self.dataset, self.num_samples, self.num_epochs = dataset, num_samples, num_epochs
        self.blend = Blend(dataset.sizes, weights, seed)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        pack = self.pack_number(index)
        return self.dataset.untrained_sample() if pack is None else self.dataset[pack]

    def pack_number(self, index: int) -> int | None:
        """The number of the pack that sample `index` is; None after the last epoch.

        Raises:
            IndexError: outside [0, num_samples).
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        if self.num_epochs is not None and index >= self.blend.samples_before(self.num_epochs):
            return None
        return self.blend.pack(index)[1]

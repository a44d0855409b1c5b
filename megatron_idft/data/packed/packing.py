"""Documents into packs of bounded size. Documents are never cut here. Numbers only: no files, no tokens.

Best-fit decreasing, the longest document first, each into the fullest pack that still takes it, never needs more than
11/9 of the optimum and 6/9 of a pack (Dósa and others, "Tight absolute bound for First Fit Decreasing", 2013; the same
bound holds for best fit), and on long-tailed mixes fills all but the last packs. Documents of one length are alike, so
it runs over lengths and counts: packs of the same content are one group, whatever their number. The work grows with the
number of distinct lengths and groups, not with the documents, of which there may be billions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Packs:
    """Which documents each pack holds.

    Attributes:
        order: int64 [documents], the documents' indices pack by pack.
        bounds: int64 [packs + 1], where each begins.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]


@dataclass(slots=True)
class _Content:
    """`count` documents of one length, after `before`: a pack's documents, as a chain."""

    before: "_Content | None"
    length: int
    count: int


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int, seed: int | None = None) -> Packs:
    """Packs of documents whose lengths sum up to at most `capacity`. Holds about 40 bytes for each document.

    Args:
        lengths: [documents], each from 1 to capacity.
        capacity: of a pack.
        seed: mixes the packs, and the documents of one length among themselves; None: the fullest pack first, documents
            of one length in their order.

    Raises:
        ValueError: a length outside [1, capacity].
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}, got {lengths.min()} to {lengths.max()}")
    groups = _groups(np.bincount(lengths, minlength=capacity + 1), capacity)
    packs = _fill(groups, _by_length(lengths, seed), np.bincount(lengths, minlength=capacity + 1))
    return packs if seed is None else _shuffled(packs, seed)


def one_each(documents: int) -> Packs:
    """Each document in a pack of its own, in their order."""
    return Packs(np.arange(documents), np.arange(documents + 1))


def _groups(counts: NDArray[np.int64], capacity: int) -> list[tuple[int, _Content]]:
    """(number of packs, what each of them holds), by best-fit decreasing over documents of counts[length] each."""
    by_room: dict[int, list[tuple[int, _Content]]] = {}
    rooms = 0  # bit r is set where there are packs with room for exactly r more

    def put(packs: int, room: int, content: _Content) -> None:
        nonlocal rooms
        by_room.setdefault(room, []).append((packs, content))
        rooms |= 1 << room

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # the least that suffices
                packs, content = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, packs, content = capacity, left, None  # as many empty packs as could be needed
            # Once a document of this length is in, the same pack is the best fit for the next, while it fits.
            each = room // length
            filled = min(packs, left // each)
            if filled:
                put(filled, room - each * length, _Content(content, length, each))
            left -= filled * each
            packs -= filled
            if packs and 0 < left < each:
                put(1, room - left * length, _Content(content, length, left))
                packs, left = packs - 1, 0
            if packs and content is not None:
                put(packs, room, content)
    return [group for room in sorted(by_room) for group in by_room[room]]


def _by_length(lengths: NDArray[np.integer], seed: int | None) -> NDArray[np.int64]:
    """The documents' indices, the shortest first."""
    small = lengths.astype(np.uint16) if len(lengths) and lengths.max() < 1 << 16 else lengths  # sorted in linear time
    if seed is None:
        return np.argsort(small, kind="stable")
    mixed = permutation(len(lengths), seed, 0)
    order: NDArray[np.int64] = mixed[np.argsort(small[mixed], kind="stable")]
    return order


def _fill(groups: Sequence[tuple[int, _Content]], documents: NDArray[np.int64], counts: NDArray[np.int64]) -> Packs:
    """Give each group of packs its documents, from `documents`, which are sorted by length."""
    following = np.concatenate([[0], np.cumsum(counts)[:-1]])  # the next unused document of each length
    order = np.empty(len(documents), dtype=np.int64)
    sizes, at = [], 0
    for packs, last in groups:
        columns = []
        content: _Content | None = last
        while content is not None:
            begin, number = int(following[content.length]), packs * content.count
            columns.append(documents[begin : begin + number].reshape(packs, content.count))
            following[content.length] += number
            content = content.before
        filled = np.concatenate(columns[::-1], axis=1)  # the longest first
        order[at : at + filled.size] = filled.ravel()
        sizes.append(np.full(packs, filled.shape[1], dtype=np.int64))
        at += filled.size
    return Packs(order, np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.empty(0, np.int64)]))]))


def _shuffled(packs: Packs, seed: int) -> Packs:
    mixed = permutation(len(packs), seed, 1)
    sizes = np.diff(packs.bounds)[mixed]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    moved = np.repeat(packs.bounds[:-1][mixed] - bounds[:-1], sizes)
    return Packs(packs.order[moved + np.arange(len(packs.order))], bounds)


def permutation(n: int, seed: int, stream: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 [n], a pure function of (n, seed, stream).

    Sorted random keys rather than `Generator.permutation`: numpy promises the same raw bits of Philox in every
    release, but not the same permutation, and a run may be resumed in another container.
    """
    return np.argsort(np.random.Philox(key=[seed % 2**64, stream]).random_raw(n), kind="stable")


def first_fit(lengths: Sequence[int], capacity: int) -> int:
    """How many packs first-fit needs that takes the documents as they come: the rival in the reports. O(n log n)."""
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    most = [capacity] * (2 * leaves)  # the greatest room among the packs below each node of a binary tree
    used = 0
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            if most[node] < length:
                node += 1
        used = max(used, node - leaves + 1)
        most[node] -= length
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return used


def efficiency(lengths: NDArray[np.integer], packs: int, capacity: int) -> float:
    """The share of the packs' positions that hold documents."""
    return float(np.sum(lengths, dtype=np.int64)) / (packs * capacity) if packs else 0.0

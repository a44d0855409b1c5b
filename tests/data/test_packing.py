"""Which documents share a pack: against best-fit decreasing item by item, against the optimum, and in bulk."""

import itertools

import numpy as np
import pytest

from megatron_idft.data.packed.packing import best_fit_decreasing, efficiency, first_fit


def contents(packs, lengths):
    return sorted(tuple(sorted(lengths[i] for i in packs[p])) for p in range(len(packs)))


def item_by_item(lengths, capacity):
    rooms, packs = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            _, i = min(fitting)
            rooms[i] -= length
            packs[i].append(length)
        else:
            rooms.append(capacity - length)
            packs.append([length])
    return packs


def optimum(lengths, capacity):
    """The least number of packs, by trying every assignment."""
    best = len(lengths)

    def place(rest, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        tried = set()
        for i, room in enumerate(rooms):
            if room >= rest[0] and room not in tried:
                tried.add(room)
                place(rest[1:], [*rooms[:i], room - rest[0], *rooms[i + 1 :]])
        place(rest[1:], [*rooms, capacity - rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 200)))
    if seed % 2:
        lengths = np.minimum(lengths, rng.integers(1, capacity + 1))  # many alike
    packs = best_fit_decreasing(lengths, capacity)
    reference = item_by_item(lengths.tolist(), capacity)
    assert len(packs) == len(reference)
    # Ties between packs with equal room may be broken otherwise, which changes no pack's room: compare the rooms.
    assert sorted(map(sum, contents(packs, lengths))) == sorted(map(sum, reference))


@pytest.mark.parametrize("seed", range(25))
def test_tiny_cases_are_within_the_proven_bound_of_the_optimum(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, 9)
    packs = len(best_fit_decreasing(lengths, 20))
    assert optimum(lengths, 20) <= packs <= 11 / 9 * optimum(lengths, 20) + 6 / 9
    assert optimum(lengths, 20) <= first_fit(lengths.tolist(), 20) <= 1.7 * optimum(lengths, 20)


def test_every_document_is_in_one_pack_and_no_pack_overflows():
    lengths = np.random.default_rng(0).integers(1, 513, 5000)
    for seed in (None, 1):
        packs = best_fit_decreasing(lengths, 512, seed)
        assert sorted(packs.order.tolist()) == list(range(5000))
        assert max(int(lengths[packs[p]].sum()) for p in range(len(packs))) <= 512
        assert all(len(packs[p]) for p in range(len(packs)))


def test_a_seed_mixes_packs_and_documents_but_not_the_number_of_packs():
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    plain, one, same, two = (best_fit_decreasing(lengths, 128, seed) for seed in (None, 1, 1, 2))
    assert len(plain) == len(one) == len(two) and contents(plain, lengths) == contents(one, lengths)
    assert np.array_equal(one.order, same.order) and np.array_equal(one.bounds, same.bounds)
    assert not np.array_equal(one.order, two.order) and not np.array_equal(plain.order, one.order)
    means = [lengths[one[p]].mean() for p in range(len(one))]
    first, second = np.mean(means[: len(one) // 2]), np.mean(means[len(one) // 2 :])
    assert 0.7 < first / second < 1.4  # the long documents are not at the beginning
    first, second = (lengths[plain.order[part]].mean() for part in (slice(0, 1000), slice(1000, 2000)))
    assert not 0.7 < first / second < 1.4  # which is where they are without


@pytest.mark.parametrize("capacity", [2048, 4096, 32768])
def test_long_tailed_mixes_are_packed_to_97_percent(capacity):
    rng = np.random.default_rng(7)
    lengths = np.clip(rng.lognormal(6, 1.1, 30_000), 8, capacity).astype(np.int64)
    packs = best_fit_decreasing(lengths, capacity, seed=3)
    share = efficiency(lengths, len(packs), capacity)
    ahead = efficiency(lengths[:5000], len(best_fit_decreasing(lengths[:5000], capacity)), capacity)
    assert share >= 0.97
    assert ahead >= efficiency(lengths[:5000], first_fit(lengths[:5000].tolist(), capacity), capacity)


def test_half_full_documents_cannot_be_packed_and_the_figure_says_so():
    lengths = np.full(1000, 51)
    packs = best_fit_decreasing(lengths, 100)
    assert len(packs) == 1000 and efficiency(lengths, len(packs), 100) == pytest.approx(0.51)


def test_the_edges():
    assert len(best_fit_decreasing(np.empty(0, dtype=np.int64), 8)) == 0 == first_fit([], 8)
    assert [p.tolist() for p in map(best_fit_decreasing(np.array([8]), 8).__getitem__, [0])] == [[0]]
    for wrong in ([0, 3], [9], [-1]):
        with pytest.raises(ValueError, match="from 1 to 8"):
            best_fit_decreasing(np.array(wrong), 8)


def test_first_fit_is_first_fit():
    rng = np.random.default_rng(0)
    for capacity, count in itertools.product((7, 30), (1, 2, 50)):
        lengths = rng.integers(1, capacity + 1, count).tolist()
        rooms = []
        for length in lengths:
            i = next((i for i, room in enumerate(rooms) if room >= length), None)
            if i is None:
                rooms.append(capacity - length)
            else:
                rooms[i] -= length
        assert first_fit(lengths, capacity) == len(rooms)

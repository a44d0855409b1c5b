"""Paired bootstrap over seeds and problems, and curves read at an equal distance or an equal accuracy."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64], NDArray[np.int64]], float]
DRAWS = 2000


class Estimate(NamedTuple):
    """A value and its 95 % interval; NaN bounds where nothing could be drawn."""

    value: float
    low: float
    high: float


class Place(NamedTuple):
    """On a curve: between point `index` and the next one, at `share` of the way."""

    index: int
    share: float


def bootstrap(statistic: Statistic, seeds: int, problems: int, draws: int = DRAWS) -> Estimate:
    """95 % percentile interval of `statistic(seed indices, problem indices)`, both drawn with replacement, crossed.

    Every seed is asked the same problems, so a draw of problems holds for all drawn seeds. Few seeds make the interval
    too narrow; a single one leaves the problems alone. Draws in which the statistic is NaN are left out; where these
    are more than one in twenty there is no interval.
    """
    rng = np.random.default_rng(0)
    value = statistic(np.arange(seeds), np.arange(problems))
    drawn = np.array(
        [statistic(rng.integers(seeds, size=seeds), rng.integers(problems, size=problems)) for _ in range(draws)]
    )
    known = drawn[~np.isnan(drawn)]
    if np.isnan(value) or len(known) < 0.95 * draws:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def paired_difference(a: Values, b: Values, draws: int = DRAWS) -> Estimate:
    """Mean of a - b, both [seeds, problems] of the same seeds and problems."""
    difference = a - b
    return bootstrap(
        lambda seeds, problems: float(difference[np.ix_(seeds, problems)].mean()), *difference.shape, draws
    )


def place_of(values: Sequence[float] | Values, level: float) -> Place | None:
    """Where a curve first reaches `level`, from whichever side it begins; None: never. Straight between its points."""
    for i, (left, right) in enumerate(pairwise(values)):
        if left == level or (left - level) * (right - level) < 0 or right == level:
            share = 0.0 if left == right else (level - left) / (right - left)
            return Place(i, float(share))
    return None


def value_at(values: Values, place: Place) -> Values:
    """[points, …] -> […] at a place of the curve."""
    left, right = values[place.index], values[place.index + 1]
    return (1 - place.share) * left + place.share * right


def at_equal(x: Sequence[Values], y: Sequence[Values], level: float) -> Values | None:
    """Each seed's y where its x first reaches `level`: [seeds, problems]. None where a seed's curve never does.

    Args:
        x: of each seed, [points] of its curve, in the order of training, untrained first.
        y: of each seed, [points, problems].
    """
    places = [place_of(values, level) for values in x]
    if any(place is None for place in places):
        return None
    return np.stack([value_at(values, place) for values, place in zip(y, places, strict=True) if place is not None])

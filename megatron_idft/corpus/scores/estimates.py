"""Estimates over the tokens of many records, with standard errors that treat each record as one draw.

The tokens of a record are not independent of each other, so an error that counts tokens would be far too small. Every
quantity here is a smooth function of sums over records that does not change when all sums are scaled (a mean, a share,
a standard deviation); its error follows from the record's contributions by the delta method, so that one vector of sums
and one matrix of their products are all that a pass over the corpus has to keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

# Contributions of a record to the sums. listed_…: only records that came with per-token lists. first_…: their first
# tokens. end_…: the token that ends the turn.
FIELDS = (
    "tokens",
    "phi",
    "phi_squared",
    "log_prob",
    "entropy",
    "below_1",
    "below_3",
    "below_5",
    "listed_tokens",
    "listed_phi",
    "first_tokens",
    "first_phi",
    "end_tokens",
    "end_phi",
)


class EstimateNumbers(TypedDict):
    """An estimate in a JSON; `se` is null where there are too few records to tell."""

    value: float
    se: float | None


class Estimate(NamedTuple):
    """A value and its standard error; the error is None where there are too few records to tell."""

    value: float
    se: float | None

    def minus(self, other: Estimate) -> Estimate:
        """The difference to an estimate from other records."""
        known = self.se is not None and other.se is not None
        return Estimate(self.value - other.value, math.hypot(self.se or 0, other.se or 0) if known else None)

    def exceeds(self, limit: float, standard_errors: float) -> bool:
        """Whether the value is above `limit`, and above 0 by so many standard errors."""
        return self.value >= limit and self.se is not None and self.value >= standard_errors * self.se

    def as_json(self) -> EstimateNumbers:
        return {"value": self.value, "se": self.se}


class ClusterSums:
    """records: how many; sums: [F] float64; products: [F, F], the sum over records of the outer product.

    A subclass may sum other fields.
    """

    __slots__ = ("products", "records", "sums")
    fields: ClassVar[tuple[str, ...]] = FIELDS

    def __init__(self) -> None:
        self.records = 0
        self.sums: NDArray[np.float64] = np.zeros(len(self.fields))
        self.products: NDArray[np.float64] = np.zeros((len(self.fields), len(self.fields)))

    def add(self, contribution: Mapping[str, float]) -> None:
        """One record, by field; what is not named is 0."""
        vector = np.array([contribution.get(field, 0.0) for field in self.fields])
        self.records += 1
        self.sums += vector
        self.products += np.outer(vector, vector)

    @classmethod
    def total(cls, parts: Iterable[Self]) -> Self:
        whole = cls()
        for part in parts:
            whole.records += part.records
            whole.sums += part.sums
            whole.products += part.products
        return whole

    def without(self, part: Self) -> Self:
        """The other records, where `part` is some of these."""
        rest = type(self)()
        rest.records = self.records - part.records
        rest.sums = self.sums - part.sums
        rest.products = self.products - part.products
        return rest

    def __getitem__(self, field: str) -> float:
        return float(self.sums[self.fields.index(field)])

    def ratio(self, numerator: str, denominator: str = "tokens") -> Estimate | None:
        """Sum over sum: the mean per token. None where there are no tokens."""
        if not self[denominator]:
            return None
        value = self[numerator] / self[denominator]
        return self.estimate(value, {numerator: 1 / self[denominator], denominator: -value / self[denominator]})

    def std(self) -> Estimate | None:
        """Standard deviation of phi over tokens."""
        tokens = self["tokens"]
        if not tokens:
            return None
        mean = self["phi"] / tokens
        variance = max(0.0, self["phi_squared"] / tokens - mean**2)
        std = math.sqrt(variance)
        if std < 1e-12:
            return Estimate(0.0, None)
        scale = 1 / (2 * std * tokens)
        slope = {"phi_squared": scale, "phi": -2 * mean * scale, "tokens": (mean**2 - variance) * scale}
        return self.estimate(std, slope)

    def first_against_rest(self) -> Estimate | None:
        """Mean phi of the first tokens less that of the tokens after them, over records with per-token lists."""
        first, rest = self["first_tokens"], self["listed_tokens"] - self["first_tokens"]
        if not first or not rest:
            return None
        at_first, behind = self["first_phi"] / first, (self["listed_phi"] - self["first_phi"]) / rest
        slope = {
            "first_phi": 1 / first + 1 / rest,
            "first_tokens": -at_first / first - behind / rest,
            "listed_phi": -1 / rest,
            "listed_tokens": behind / rest,
        }
        return self.estimate(at_first - behind, slope)

    def estimate(self, value: float, slope: Mapping[str, float]) -> Estimate:
        """A function of the sums that does not change when all of them are scaled, with its standard error.

        Args:
            value: of the function.
            slope: its derivative by field.
        """
        if self.records < 2:
            return Estimate(value, None)
        gradient = np.zeros(len(self.fields))
        for field, derivative in slope.items():
            gradient[self.fields.index(field)] = derivative
        # The contributions gradient · record add up to 0, so their squares are their variance already.
        squares = max(0.0, float(gradient @ self.products @ gradient))
        return Estimate(value, math.sqrt(squares * self.records / (self.records - 1)))

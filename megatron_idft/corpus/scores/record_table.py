"""Keeps about 100 bytes of every record, to find duplicates and to pair two checkpoints."""

from __future__ import annotations

import math
from array import array
from hashlib import blake2b
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.estimates import Estimate, EstimateNumbers
from megatron_idft.corpus.scores.rows import RecordPlace, ScoredRow

SHOWN_GROUPS, SHOWN_MEMBERS = 3, 3
_Contribution = tuple[float, NDArray[np.float64]]  # an estimate, and each record's share in its deviation


def hash64(text: str) -> int:
    """64 bits; among ten million different texts two collide with a probability of 3e-6."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class RepeatedGroup(TypedDict):
    """Equal records: how many, and the first of them."""

    records: int
    examples: list[RecordPlace]


class Repeats(TypedDict):
    """Equal records.

    Attributes:
        repeats: records that are not the first of their group.
        groups: how many.
        largest: the groups with the most records.
    """

    repeats: int
    groups: int
    largest: list[RepeatedGroup]


class Difference(TypedDict):
    """Of one mean under two checkpoints."""

    before: float
    after: float
    difference: EstimateNumbers


class PairedDifferences(TypedDict):
    """Of the records in both tables; the means are absent where there are no tokens.

    Attributes:
        pairs: records in both.
        unpaired: the other records of either table.
    """

    pairs: int
    unpaired: list[int]
    phi_mean: NotRequired[Difference]
    phi_std: NotRequired[Difference]
    log_prob_mean: NotRequired[Difference]


class RecordTable:
    """Typed columns, one entry per record, in the order in which they came."""

    def __init__(self) -> None:
        self._ids, self._id_ends = bytearray(), array("Q")
        self._files: dict[str, int] = {}
        self._file, self._line = array("I"), array("Q")
        self._id, self._response, self._pair = array("Q"), array("Q"), array("Q")
        self._tokens, self._phi, self._phi_squared, self._log_prob = array("d"), array("d"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._line)

    def add(self, row: ScoredRow, tokens: int, phi: float, phi_squared: float, log_prob: float) -> None:
        """Keep one record.

        Args:
            row: of the record.
            tokens: of the response.
            phi: sum over the tokens.
            phi_squared: sum over the tokens.
            log_prob: sum over the tokens.
        """
        self._ids += row["id"].encode("utf-8", "surrogatepass")
        self._id_ends.append(len(self._ids))
        self._file.append(self._files.setdefault(row["file"], len(self._files)))
        self._line.append(row["line"])
        self._id.append(hash64(row["id"]))
        self._response.append(hash64(row["response_hash"]))
        self._pair.append(hash64(row["prompt_hash"] + "\0" + row["response_hash"]))
        self._tokens.append(tokens)
        self._phi.append(phi)
        self._phi_squared.append(phi_squared)
        self._log_prob.append(log_prob)

    def place(self, index: int) -> RecordPlace:
        """id, file and line of a record."""
        start, end = self._id_ends[index - 1] if index else 0, self._id_ends[index]
        return {
            "id": self._ids[start:end].decode("utf-8", "surrogatepass"),
            "file": list(self._files)[self._file[index]],
            "line": self._line[index],
        }

    def lengths(self) -> NDArray[np.float64]:
        return _column(self._tokens)

    def repeated_records(self) -> Repeats:
        """Records whose prompt and response both stand in an earlier record."""
        return self._repeats(_column(self._pair, np.uint64))

    def repeated_responses(self, min_tokens: int) -> Repeats:
        """Records whose response, of at least `min_tokens`, stands in an earlier record under another prompt."""
        _, first_of_pair = np.unique(_column(self._pair, np.uint64), return_index=True)
        first_of_pair.sort()
        kept = first_of_pair[self.lengths()[first_of_pair] >= min_tokens]
        return self._repeats(_column(self._response, np.uint64)[kept], kept)

    def _repeats(self, keys: NDArray[np.uint64], rows: NDArray[np.intp] | None = None) -> Repeats:
        rows = np.arange(len(keys)) if rows is None else rows
        _, first, group, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        repeated = np.flatnonzero(counts > 1)
        shown: list[RepeatedGroup] = []
        for number in repeated[np.lexsort((first[repeated], -counts[repeated]))][:SHOWN_GROUPS]:
            members = rows[np.flatnonzero(group == number)]
            shown.append(
                {"records": len(members), "examples": [self.place(int(row)) for row in members[:SHOWN_MEMBERS]]}
            )
        return {"repeats": int(counts[repeated].sum()) - len(repeated), "groups": len(repeated), "largest": shown}


def paired_differences(before: RecordTable, after: RecordTable) -> PairedDifferences:
    """Per-token means of `after` less those of `before` over the records that both hold, paired by id.

    A record that is easy for one model is mostly easy for the other, so the error of the paired difference is smaller
    than that of two independent means. Of records with one id in the same corpus, the first counts.
    """
    _, i, j = np.intersect1d(_column(before._id, np.uint64), _column(after._id, np.uint64), return_indices=True)
    result: PairedDifferences = {"pairs": len(i), "unpaired": [len(before) - len(i), len(after) - len(j)]}
    contributions = []
    for table, rows in ((before, i), (after, j)):
        columns = [_column(c)[rows] for c in (table._tokens, table._phi, table._phi_squared, table._log_prob)]
        if not columns[0].sum():
            return result
        contributions.append(_contributions(*columns))
    differences = [_difference(a, b) for a, b in zip(*contributions, strict=True)]
    result["phi_mean"], result["phi_std"], result["log_prob_mean"] = differences
    return result


def _difference(before: _Contribution, after: _Contribution) -> Difference:
    (a, by_record_a), (b, by_record_b) = before, after
    records, se = len(by_record_a), None
    if records > 1:
        se = math.sqrt(float(np.square(by_record_b - by_record_a).sum()) * records / (records - 1))
    return {"before": a, "after": b, "difference": Estimate(b - a, se).as_json()}


def _contributions(
    tokens: NDArray[np.float64],
    phi: NDArray[np.float64],
    phi_squared: NDArray[np.float64],
    log_prob: NDArray[np.float64],
) -> tuple[_Contribution, _Contribution, _Contribution]:
    """Of the mean and the spread of phi and of the mean of log p, by the delta method."""
    total = float(tokens.sum())
    mean, log_prob_mean = float(phi.sum()) / total, float(log_prob.sum()) / total
    variance = max(0.0, float(phi_squared.sum()) / total - mean**2)
    std = math.sqrt(variance)
    of_mean, of_log_prob = (phi - mean * tokens) / total, (log_prob - log_prob_mean * tokens) / total
    of_std = np.zeros_like(tokens)
    if std > 1e-12:
        of_std = (phi_squared - 2 * mean * phi + (mean**2 - variance) * tokens) / (2 * std * total)
    return (mean, of_mean), (std, of_std), (log_prob_mean, of_log_prob)


def _column(values: array[Any], dtype: Any = np.float64) -> NDArray[Any]:
    # A copy: an array whose memory is shared cannot grow any more.
    return np.frombuffer(values, dtype=dtype).copy() if len(values) else np.zeros(0, dtype=dtype)

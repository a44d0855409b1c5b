"""Sums up a scored corpus for the report and the linter, in one pass and in memory that tokens do not fill.

It keeps sums, histograms, a sample of cumulative curves and the extreme records; per record only the hashes and sums of
`RecordTable`. Equal rows give an equal summary: where a choice must be made, a hash of the record's id makes it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from heapq import heappush, heappushpop
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.display import (
    ShownRecord,
    ShownToken,
    bounded,
    display_record,
    display_worst_token,
    place_of,
)
from megatron_idft.corpus.scores.estimates import ClusterSums
from megatron_idft.corpus.scores.record_table import RecordTable, hash64
from megatron_idft.corpus.scores.rows import RecordPlace, ScoredRow
from megatron_idft.errors import InputError

# Inner edges; the first and the last bin are open. They refine those of integration/loss/metrics.py.
PHI_EDGES = np.arange(-40, 17) * 0.25  # -10 … 4
RECORD_EDGES = np.arange(-60, 31) * 0.05  # of records' mean phi: -3 … 1.5
# Positions of the cumulative curves: each of the first 16, then 12 % apart.
CURVE_POSITIONS = np.array(sorted({*range(1, 17), *(round(16 * 1.12**step) for step in range(80))}))
CURVE_SAMPLE = 1000  # records whose curves are kept for the percentiles
FIRST_TOKENS = 4
MIN_TOKENS_TO_RANK = 16  # the mean phi of shorter responses is mostly chance: ranked only where nothing longer is left
MAX_SOURCES = 1000  # a column with a value of its own in every record is no source
FURTHER_SOURCES = "(further sources)"
WORST_TOKENS = 20
EXAMPLES = 5

_REQUIRED = ("id", "file", "line", "num_tokens", "truncated", "ends_turn", "prompt_hash", "response_hash")
_MEANS = ("phi_mean", "phi_std", "log_prob_mean", "entropy_mean", "phi_below_1", "phi_below_3", "phi_below_5")


@dataclass
class Tally:
    """How many records something holds for, and the first of them."""

    count: int = 0
    examples: list[RecordPlace] = field(default_factory=list)

    def add(self, row: ScoredRow) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(place_of(row))


class CurveNumbers(TypedDict):
    """positions, and at each the mean, the standard deviation and percentiles over records; none without records."""

    records: int
    records_in_percentiles: int
    positions: list[int]
    mean: NotRequired[list[float]]
    std: NotRequired[list[float]]
    p10: NotRequired[list[float]]
    p50: NotRequired[list[float]]
    p90: NotRequired[list[float]]


class Curves:
    """Cumulative phi by token position. A record that has ended keeps its last value.

    So the own samples' mean stays 0 at every position (a stopped martingale), which the mean over the records that are
    still running would not: whether a record runs on depends on what was sampled.
    """

    def __init__(self) -> None:
        self.records = 0
        self.longest = 0
        self.sums = np.zeros(len(CURVE_POSITIONS))
        self.squares = np.zeros(len(CURVE_POSITIONS))
        self._sample: list[tuple[int, int, NDArray[np.float64]]] = []  # the records with the smallest hashes

    def add(self, record_id: str, phi: NDArray[np.float64]) -> None:
        curve = np.cumsum(phi)[np.minimum(CURVE_POSITIONS, len(phi)) - 1]
        self.records += 1
        self.longest = max(self.longest, len(phi))
        self.sums += curve
        self.squares += np.square(curve)
        entry = (-hash64(record_id), -self.records, curve)  # the second breaks ties before the curves are compared
        if len(self._sample) < CURVE_SAMPLE:
            heappush(self._sample, entry)
        else:
            heappushpop(self._sample, entry)

    def as_json(self) -> CurveNumbers:
        """The curve of the mean record."""
        shown = slice(0, int(np.searchsorted(CURVE_POSITIONS, self.longest)) + 1)
        data: CurveNumbers = {"records": self.records, "records_in_percentiles": len(self._sample), "positions": []}
        if not self.records:
            return data
        mean = self.sums / self.records
        variance = np.maximum(0.0, self.squares / self.records - mean**2) * self.records / max(1, self.records - 1)
        data["positions"] = CURVE_POSITIONS[shown].tolist()
        data["mean"], data["std"] = mean[shown].tolist(), np.sqrt(variance)[shown].tolist()
        percentiles = np.percentile([curve for _, _, curve in self._sample], (10, 50, 90), axis=0)
        data["p10"], data["p50"], data["p90"] = (values[shown].tolist() for values in percentiles)
        return data


class Extremes[Key: tuple[float, ...], Entry]:
    """The `keep` entries with the smallest keys, one for each `identity`."""

    def __init__(self, keep: int):
        self.keep = keep
        self._entries: list[tuple[Key, str, Entry]] = []

    def offer(self, key: Key, identity: str, make: Callable[[], Entry]) -> None:
        """`make` is called only for an entry that is kept."""
        if not self.keep or (len(self._entries) == self.keep and key >= self._entries[-1][0]):
            return
        same = next((entry for entry in self._entries if entry[1] == identity), None)
        if same is not None:
            if key >= same[0]:
                return
            self._entries.remove(same)
        insort(self._entries, (key, identity, make()), key=lambda entry: entry[0])
        del self._entries[self.keep :]

    def values(self) -> list[Entry]:
        return [value for _, _, value in self._entries]


@dataclass
class Recurrence:
    """A token among its records' worst: its text, how often it stands there, and the sum of its phi there."""

    token: str
    times: int = 0
    phi: float = 0.0


class RecurringToken(TypedDict):
    """A token that stands among the worst of several records.

    Attributes:
        phi_mean: of the token there.
    """

    token_id: int
    token: str
    times: int
    phi_mean: float


class SourceSummary:
    """Sums and histogram of one source."""

    def __init__(self) -> None:
        self.sums = ClusterSums()
        self.histogram = np.zeros(len(PHI_EDGES) + 1, dtype=np.int64)


class CorpusSummary:
    """A scored corpus, or the own samples of a model.

    Args:
        name, model: how the report calls the corpus and the checkpoint that scored it.
        keep: how many most and least in-distribution records are kept for display.
        tests: name -> what is to be tallied of the rows.
    """

    def __init__(
        self, name: str, model: str, *, keep: int = 0, tests: Mapping[str, Callable[[ScoredRow], bool]] | None = None
    ):
        self.name, self.model, self.keep = name, model, keep
        self.table = RecordTable()
        self.sources: dict[str | None, SourceSummary] = {}
        self.record_histogram = np.zeros(len(RECORD_EDGES) + 1, dtype=np.int64)
        self.curves = Curves()
        self.tallies = {test: Tally() for test in tests or {}}
        self.not_finite = Tally()
        self._tests = tests or {}
        # One more than shown: least and most must not show the same records of a small corpus.
        self._least, self._most = (Extremes[tuple[float, ...], ShownRecord](2 * keep) for _ in range(2))
        self._worst = Extremes[tuple[float, ...], ShownToken](WORST_TOKENS if keep else 0)
        self._recurring: dict[int, Recurrence] = {}  # by token id; bounded by the vocabulary

    def add(self, row: ScoredRow) -> None:
        """Add one row; the lists per token may be absent.

        Raises:
            InputError: a row without a needed column, or with lists of different lengths.
        """
        for key in _REQUIRED:
            if row.get(key) is None:
                raise InputError(f"{self.name}, record {row.get('id')!r}: no {key}; is this a row that `score` wrote?")
        for test, holds in self._tests.items():
            if holds(row):
                self.tallies[test].add(row)
        tokens = int(row["num_tokens"])
        phi = self._listed_phi(row)
        numbers = all(_finite(row.get(key)) for key in _MEANS) and (phi is None or bool(np.isfinite(phi).all()))
        if tokens and not numbers:
            self.not_finite.add(row)
            tokens, phi = 0, None  # counted as a record, but no number may turn into NaN
        sums = {"tokens": float(tokens)}
        if tokens:
            sums |= {
                "phi": tokens * row["phi_mean"],
                "phi_squared": tokens * (row["phi_std"] ** 2 + row["phi_mean"] ** 2),
                "log_prob": tokens * row["log_prob_mean"],
                "entropy": tokens * row["entropy_mean"],
                "below_1": tokens * row["phi_below_1"],
                "below_3": tokens * row["phi_below_3"],
                "below_5": tokens * row["phi_below_5"],
            }
            self.record_histogram[np.searchsorted(RECORD_EDGES, row["phi_mean"], side="right")] += 1
        source = self._source(row)
        if phi is not None:
            sums |= {
                "listed_tokens": float(len(phi)),
                "listed_phi": float(phi.sum()),
                "first_tokens": float(min(FIRST_TOKENS, len(phi))),
                "first_phi": float(phi[:FIRST_TOKENS].sum()),
            }
            if row["ends_turn"]:
                sums |= {"end_tokens": 1.0, "end_phi": float(phi[-1])}
            bins = np.searchsorted(PHI_EDGES, phi, side="right")
            source.histogram += np.bincount(bins, minlength=len(PHI_EDGES) + 1)
            self.curves.add(row["id"], phi)
        source.sums.add(sums)
        self.table.add(row, tokens, sums.get("phi", 0.0), sums.get("phi_squared", 0.0), sums.get("log_prob", 0.0))
        if tokens and self.keep:
            self._rank(row)

    def _source(self, row: ScoredRow) -> SourceSummary:
        name = row.get("source")
        if name not in self.sources and len(self.sources) >= MAX_SOURCES:
            name = FURTHER_SOURCES
        return self.sources.setdefault(name, SourceSummary())

    def _listed_phi(self, row: ScoredRow) -> NDArray[np.float64] | None:
        phi = row.get("phi")
        if phi is None or not len(phi):
            return None
        lists = {"token_ids": row.get("token_ids"), "tokens": row.get("tokens"), "log_prob": row.get("log_prob")}
        for name, entries in (lists | {"entropy": row.get("entropy"), "phi": phi}).items():
            if entries is not None and len(entries) != row["num_tokens"]:
                raise InputError(
                    f"{self.name}, record {row['id']!r}: {len(entries)} entries in {name}, but {row['num_tokens']}"
                    " scored tokens"
                )
        return np.asarray(phi, dtype=np.float64)

    def _rank(self, row: ScoredRow) -> None:
        short, tie = row["num_tokens"] < MIN_TOKENS_TO_RANK, hash64(row["id"])
        for extremes, sign in ((self._least, 1), (self._most, -1)):
            extremes.offer((short, sign * row["phi_mean"], tie), row["response_hash"], partial(display_record, row))
        for token in row.get("worst_tokens") or ():
            if not all(map(_finite, (token["phi"], token["log_prob"], token["entropy"]))):
                continue
            # Repeated records would fill the table with one token.
            identity = f"{row['response_hash']}:{token['position']}"
            key = (token["phi"], tie, token["position"])
            self._worst.offer(key, identity, partial(display_worst_token, row, token))
            entry = self._recurring.setdefault(token["token_id"], Recurrence(bounded(token["token"])))
            entry.times += 1
            entry.phi += token["phi"]

    @property
    def records(self) -> int:
        return len(self.table)

    def total(self) -> ClusterSums:
        return ClusterSums.total(source.sums for source in self.sources.values())

    def histogram(self) -> NDArray[np.int64]:
        counts = np.zeros(len(PHI_EDGES) + 1, dtype=np.int64)
        for source in self.sources.values():
            counts += source.histogram
        return counts

    def least(self) -> list[ShownRecord]:
        """Records for display, the lowest mean phi first."""
        ranked = self._least.values()
        return ranked[: min(self.keep, (len(ranked) + 1) // 2)]

    def most(self) -> list[ShownRecord]:
        """Records for display, the highest mean phi first; none that `least` shows."""
        shown = {record["response_hash"] for record in self.least()}
        return [record for record in self._most.values() if record["response_hash"] not in shown][: self.keep]

    def worst_tokens(self) -> list[ShownToken]:
        return self._worst.values()

    def recurring_tokens(self) -> list[RecurringToken]:
        """The tokens that stand most often among their records' worst."""
        ranked = sorted(self._recurring.items(), key=lambda item: (-item[1].times, item[1].phi, item[0]))
        return [
            {"token_id": token_id, "token": each.token, "times": each.times, "phi_mean": each.phi / each.times}
            for token_id, each in ranked[:10]
            if each.times > 1
        ]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

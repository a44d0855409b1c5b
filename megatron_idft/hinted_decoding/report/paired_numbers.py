"""Rewritten turns, after less before, with the standard errors of the paired difference."""

from __future__ import annotations

import math
from typing import TypedDict

from megatron_idft.corpus.report.numbers import estimate_json
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate, EstimateNumbers
from megatron_idft.hinted_decoding.report.outcome import SUMS, Sums


class PairedNumbers(TypedDict):
    """After less before, of the turns that were rewritten."""

    records: int
    turns: int
    phi_mean: EstimateNumbers | None
    log_prob_mean: EstimateNumbers | None
    entropy_mean: EstimateNumbers | None
    phi_below_1: EstimateNumbers | None
    phi_below_3: EstimateNumbers | None
    phi_below_5: EstimateNumbers | None
    phi_std: EstimateNumbers | None
    turns_risen: EstimateNumbers | None
    length_ratio: EstimateNumbers | None


class PairedSums(ClusterSums):
    """Turns that changed, those of them whose mean phi rose, and the sums of both sides."""

    fields = ("turns", "rose", *(f"before_{field}" for field in SUMS), *(f"after_{field}" for field in SUMS))

    def add_pair(self, turns: int, rose: int, before: Sums, after: Sums) -> None:
        """The changed turns of one record."""
        contribution = {"turns": float(turns), "rose": float(rose)}
        contribution |= {f"before_{field}": value for field, value in before.items()}
        contribution |= {f"after_{field}": value for field, value in after.items()}
        self.add(contribution)

    def difference(self, field: str) -> Estimate | None:
        """Mean per token after, less that before."""
        if not self["before_tokens"] or not self["after_tokens"]:
            return None
        value = 0.0
        slope: dict[str, float] = {}
        for side, sign in (("after", 1), ("before", -1)):
            tokens = self[f"{side}_tokens"]
            mean = self[f"{side}_{field}"] / tokens
            value += sign * mean
            slope |= {f"{side}_{field}": sign / tokens, f"{side}_tokens": -sign * mean / tokens}
        return self.estimate(value, slope)

    def spread_difference(self) -> Estimate | None:
        """Standard deviation of phi over tokens after, less that before."""
        if not self["before_tokens"] or not self["after_tokens"]:
            return None
        value = 0.0
        slope: dict[str, float] = {}
        for side, sign in (("after", 1), ("before", -1)):
            tokens = self[f"{side}_tokens"]
            mean = self[f"{side}_phi"] / tokens
            variance = max(0.0, self[f"{side}_phi_squared"] / tokens - mean**2)
            std = math.sqrt(variance)
            value += sign * std
            if std > 1e-12:
                scale = sign / (2 * std * tokens)
                slope |= {f"{side}_phi_squared": scale, f"{side}_phi": -2 * mean * scale}
                slope[f"{side}_tokens"] = (mean**2 - variance) * scale
        return self.estimate(value, slope)

    def as_json(self) -> PairedNumbers:
        return {
            "records": self.records,
            "turns": int(self["turns"]),
            "phi_mean": estimate_json(self.difference("phi")),
            "log_prob_mean": estimate_json(self.difference("log_prob")),
            "entropy_mean": estimate_json(self.difference("entropy")),
            "phi_below_1": estimate_json(self.difference("below_1")),
            "phi_below_3": estimate_json(self.difference("below_3")),
            "phi_below_5": estimate_json(self.difference("below_5")),
            "phi_std": estimate_json(self.spread_difference()),
            "turns_risen": estimate_json(self.ratio("rose", "turns")),
            "length_ratio": estimate_json(self.ratio("after_tokens", "before_tokens")),
        }

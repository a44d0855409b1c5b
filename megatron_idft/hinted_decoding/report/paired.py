"""Before and after of the same turns: differences whose standard errors know that a record is on both sides."""

from __future__ import annotations

import math
from typing import Any

from megatron_idft.corpus.report.numbers import estimate_json
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate
from megatron_idft.hinted_decoding.report.outcome import SUMS, Sums

_MEANS = ("phi", "log_prob", "entropy", "below_1", "below_3", "below_5")


class PairedSums(ClusterSums):
    """turns: that changed; rose: those whose mean phi is higher than before."""

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

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"records": self.records, "turns": int(self["turns"])}
        names = {field: f"phi_{field}" if field.startswith("below") else f"{field}_mean" for field in _MEANS}
        data |= {name: estimate_json(self.difference(field)) for field, name in names.items()}
        data["phi_std"] = estimate_json(self.spread_difference())
        data["turns_risen"] = estimate_json(self.ratio("rose", "turns"))
        data["length_ratio"] = estimate_json(self.ratio("after_tokens", "before_tokens"))
        return data

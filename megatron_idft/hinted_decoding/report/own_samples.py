"""What phi is compared to: the model's own samples where the rollouts are such, else the 0 that mathematics gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_idft.corpus.lint.thresholds import STANDARD_ERRORS, can_tell
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"


def judge_null(settings: Mapping[str, Any], rollouts: ClusterSums) -> dict[str, Any]:
    """{"own_samples": bool, "why", "check"}. check: whether the own samples' mean phi is 0 within its error."""
    sampling = settings.get("rollouts")
    if not isinstance(sampling, Mapping):
        return _theory("there were no rollouts")
    for key, plain in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
        if key not in sampling:
            return _theory(f"the settings do not say with which {key} the rollouts were sampled")
        value = sampling[key]
        # No top-k is written as 0 or as nothing.
        if value != plain and not (key == "top_k" and value is None):
            return _theory(f"the rollouts were sampled with {key} {value}, so they are not draws from the model itself")
    mean = rollouts.ratio("phi")
    if mean is None:
        return _theory("no rollout was scored")
    check = NOT_CHECKED
    if can_tell(rollouts.records, mean):
        check = FAILED if Estimate(abs(mean.value), mean.se).exceeds(0, STANDARD_ERRORS) else OK
    return {
        "own_samples": True,
        "why": "all rollouts, right or wrong, at temperature 1 with nothing cut",
        "check": check,
    }


def _theory(why: str) -> dict[str, Any]:
    return {"own_samples": False, "why": why, "check": NOT_CHECKED}

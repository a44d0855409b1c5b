"""One try at an assistant turn: what was drawn, what it was judged to be, and its row in the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.rows import PHI_THRESHOLDS
from megatron_idft.inference.requests import Completion

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Stage = Literal["rollout", "hinted", "retry"]
Rejection = Literal["wrong", "unverified", "unfinished", "leak"]


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A response with its statistics per token under the plain prompt, [n] each, in nats at temperature 1.

    token_ids: as drawn, with the stop token if one ended it. response_ids: what the conversation holds if it is
    accepted, ended as the template ends a turn. text: without the end. finished: it ended by itself and says something.
    seed, slope: null where they took no part. verdict, verified_by: of the verifier; None where nothing was compared.
    """

    stage: Stage
    token_ids: Ids
    response_ids: Ids
    text: str
    finish_reason: str
    finished: bool
    log_prob: Floats
    entropy: Floats
    hint_share: Floats
    hinted_entropy: Floats
    seed: int | None = None
    slope: float | None = None
    split_at: int | None = None
    verdict: str | None = None
    verified_by: str | None = None
    extracted: str | None = None
    leak: str | None = None
    accepted: bool = False
    rejected_because: Rejection | None = None

    @property
    def phi(self) -> Floats:
        return self.log_prob + self.entropy

    def row(self) -> dict[str, Any]:
        """As CANDIDATE of outcomes.py."""
        two_streams = ~np.isnan(self.hinted_entropy)
        shares = self.hint_share[two_streams]
        return {
            "stage": self.stage,
            "seed": self.seed,
            "slope": self.slope,
            "accepted": self.accepted,
            "rejected_because": self.rejected_because,
            "verdict": self.verdict,
            "verified_by": self.verified_by,
            "extracted": self.extracted,
            "leak": self.leak,
            "finish_reason": self.finish_reason,
            "text": self.text,
            "num_tokens": len(self.token_ids),
            "split_at": self.split_at,
            "hint_share_mean": float(shares.mean(dtype=np.float64)) if len(shares) else None,
            "hint_share_min": float(shares.min()) if len(shares) else None,
            **statistics(self.log_prob, self.entropy),
        }

    def provenance(self) -> dict[str, Any]:
        """What the record says of this candidate where it was accepted."""
        row, tokens = self.row(), max(len(self.token_ids), 1)
        found = {name: row[name] for name in ("stage", "finish_reason", "verdict", "verified_by", "seed", "slope")}
        found |= {name: row[name] for name in ("hint_share_mean", "hint_share_min")}
        found["phi_mean"] = row["phi_sum"] / tokens
        return found | {f"phi_below_{-limit:g}": row[f"phi_below_{-limit:g}"] / tokens for limit in PHI_THRESHOLDS}


def from_completion(
    completion: Completion, stage: Stage, end_ids: Ids, eos_id: int, decode: Callable[[Ids], str]
) -> Candidate:
    """What the engine drew. A response that the model ended with another stop token than the template's, `end_ids`, is
    written with the template's.
    """
    body = ids = completion.token_ids
    if completion.finish_reason == "eos":
        whole = len(ids) >= len(end_ids) and np.array_equal(ids[len(ids) - len(end_ids) :], end_ids)
        body = ids[: len(ids) - (len(end_ids) if whole else 1)]
    text = decode(body)
    # Where the first token is not looked at for the end, the response may have gone on behind one.
    goes_on = bool(np.isin(body, [int(end_ids[-1]), eos_id]).any())
    return Candidate(
        stage=stage,
        token_ids=ids,
        response_ids=np.concatenate([body, end_ids]).astype(np.int32),
        text=text,
        finish_reason=completion.finish_reason,
        finished=completion.finish_reason == "eos" and bool(text.strip()) and not goes_on,
        log_prob=completion.log_prob,
        entropy=completion.entropy,
        hint_share=completion.hint_share,
        hinted_entropy=completion.hinted_entropy,
        seed=completion.request.seed,
        split_at=completion.split_at,
    )


def from_text(text: str, ids: Ids, fits: bool, log_prob: Floats, entropy: Floats) -> Candidate:
    """A rollout that another engine wrote. ids: of the text and the end of the turn, cut where it does not fit."""
    return Candidate(
        stage="rollout",
        token_ids=ids,
        response_ids=ids,
        text=text,
        finish_reason="eos" if fits else "context",
        finished=fits and bool(text.strip()),
        log_prob=log_prob,
        entropy=entropy,
        hint_share=np.zeros(len(ids), dtype=np.float32),
        hinted_entropy=np.full(len(ids), np.nan, dtype=np.float32),
    )


def statistics(log_prob: Floats, entropy: Floats) -> dict[str, Any]:
    """Sums over tokens in float64, and the numbers of tokens with phi below each threshold."""
    phi = log_prob.astype(np.float64) + entropy.astype(np.float64)
    return {
        "log_prob_sum": float(log_prob.sum(dtype=np.float64)),
        "entropy_sum": float(entropy.sum(dtype=np.float64)),
        "phi_sum": float(phi.sum()),
        "phi_squared_sum": float((phi * phi).sum()),
        **{f"phi_below_{-limit:g}": int((phi < limit).sum()) for limit in PHI_THRESHOLDS},
    }

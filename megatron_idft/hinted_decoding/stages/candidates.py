"""One try at an assistant turn: the response, the verdict on it, and its row in the outcome."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.rows import PHI_THRESHOLDS
from megatron_idft.hinted_decoding.output.outcomes import CandidateRow, Rejection, ResponseSums, Stage
from megatron_idft.inference.requests import Completion

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]


class Provenance(TypedDict):
    """The origin of a rewritten turn, under `realigned` of its record. below: shares of the tokens."""

    stage: Stage
    finish_reason: str
    verdict: str | None
    verified_by: str | None
    seed: int | None
    slope: float | None
    hint_share_mean: float | None
    hint_share_min: float | None
    phi_mean: float
    phi_below_1: float
    phi_below_3: float
    phi_below_5: float


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A response with its statistics per token under the plain prompt, in nats at temperature 1.

    Attributes:
        token_ids: int32 [n], as drawn, with the stop token if one ended the response.
        response_ids: int32 [m], the turn that the conversation gets from an accepted candidate, ended as the template
            ends a turn.
        text: without the end.
        finished: the response ended by itself and says something.
        log_prob, entropy: fp32 [n].
        hint_share: fp32 [n]; 0 without a hinted stream.
        hinted_entropy: fp32 [n]; NaN without a hinted stream.
        seed, slope: None where they took no part.
        more_room: decoded again, and further, since the length limit had cut it.
        verdict, verified_by: of the verifier; None where nothing was compared.
        undecided_because: why the verdict is unknown.
        model_probability: of Yes, where the model was asked whether the response is right.
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
    more_room: bool = False
    split_at: int | None = None
    verdict: str | None = None
    verified_by: str | None = None
    undecided_because: str | None = None
    model_probability: float | None = None
    extracted: str | None = None
    leak: str | None = None
    accepted: bool = False
    rejected_because: Rejection | None = None

    @property
    def phi(self) -> Floats:
        return self.log_prob + self.entropy

    @property
    def rejection(self) -> str | None:
        """Why it was rejected, in as few words as make it countable."""
        if self.rejected_because != "unverified" or self.undecided_because is None:
            return self.rejected_because
        return f"unverified ({re.split('[:;(\'"]', self.undecided_because)[0].strip()})"

    def row(self, rejected_texts: bool = True) -> CandidateRow:
        """As it is written; the text of one that was not accepted may be left out."""
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
            "undecided_because": self.undecided_because,
            "model_probability": self.model_probability,
            "extracted": self.extracted,
            "leak": self.leak,
            "finish_reason": self.finish_reason,
            "text": self.text if rejected_texts or self.accepted else None,
            "more_room": self.more_room,
            "split_at": self.split_at,
            "hint_share_mean": float(shares.mean(dtype=np.float64)) if len(shares) else None,
            "hint_share_min": float(shares.min()) if len(shares) else None,
            **response_sums(self.log_prob, self.entropy),
        }

    def provenance(self) -> Provenance:
        """Of an accepted candidate."""
        row, tokens = self.row(), max(len(self.token_ids), 1)
        return {
            "stage": row["stage"],
            "finish_reason": row["finish_reason"],
            "verdict": row["verdict"],
            "verified_by": row["verified_by"],
            "seed": row["seed"],
            "slope": row["slope"],
            "hint_share_mean": row["hint_share_mean"],
            "hint_share_min": row["hint_share_min"],
            "phi_mean": row["phi_sum"] / tokens,
            "phi_below_1": row["phi_below_1"] / tokens,
            "phi_below_3": row["phi_below_3"] / tokens,
            "phi_below_5": row["phi_below_5"] / tokens,
        }


def from_completion(
    completion: Completion, stage: Stage, end_ids: Ids, eos_id: int, decode: Callable[[Ids], str]
) -> Candidate:
    """A response of the engine.

    Args:
        completion: the response. One that the model ended with another stop token gets the template's end instead.
        stage: the stage that it belongs to.
        end_ids: int32 [e], the template's end of a turn.
        eos_id: the tokenizer's end of text.
        decode: token ids -> text.
    """
    body = ids = completion.token_ids
    if completion.finish_reason == "eos":
        whole = len(ids) >= len(end_ids) and np.array_equal(ids[len(ids) - len(end_ids) :], end_ids)
        body = ids[: len(ids) - (len(end_ids) if whole else 1)]
    text = decode(body)
    # Where an end as the first token is ignored, the response may have gone on after it.
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


def cut_before(completion: Completion, sign: str, end_ids: Ids, decode: Callable[[Ids], str]) -> Completion:
    """The response up to a text with which the model would begin a tool call of its own, and the blanks before it.

    Args:
        completion: the response.
        sign: the text.
        end_ids: int32 [e], of the turn, with the calls that stand there instead.
        decode: token ids -> text.
    """
    ids = completion.token_ids
    text, found, _ = decode(ids).partition(sign)
    if not found:
        return completion
    text = text.rstrip()
    n = next((n for n in range(len(ids), 0, -1) if len(decode(ids[:n])) <= len(text)), 0)
    # The end of the turn takes the numbers of the token that began to go on to the call.
    kept = slice(0, n + 1)
    return replace(
        completion,
        token_ids=np.concatenate([ids[:n], end_ids[-1:]]).astype(np.int32),
        finish_reason="eos",
        log_prob=completion.log_prob[kept],
        entropy=completion.entropy[kept],
        hint_share=completion.hint_share[kept],
        hinted_entropy=completion.hinted_entropy[kept],
    )


def from_text(text: str, ids: Ids, fits: bool, log_prob: Floats, entropy: Floats) -> Candidate:
    """A rollout that another engine wrote.

    Args:
        text: the response.
        ids: int32 [n], of the text and the end of the turn, cut to the context.
        fits: nothing was cut.
        log_prob, entropy: fp32 [n], of `ids`.
    """
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


def response_sums(log_prob: Floats, entropy: Floats) -> ResponseSums:
    """Sums over the n tokens of a response, in float64.

    Args:
        log_prob, entropy: fp32 [n], nats.
    """
    phi = log_prob.astype(np.float64) + entropy.astype(np.float64)
    below = [int((phi < limit).sum()) for limit in PHI_THRESHOLDS]
    return {
        "num_tokens": len(phi),
        "log_prob_sum": float(log_prob.sum(dtype=np.float64)),
        "entropy_sum": float(entropy.sum(dtype=np.float64)),
        "phi_sum": float(phi.sum()),
        "phi_squared_sum": float((phi * phi).sum()),
        "phi_below_1": below[0],
        "phi_below_3": below[1],
        "phi_below_5": below[2],
    }

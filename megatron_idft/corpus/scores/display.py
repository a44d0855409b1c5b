"""A record in a report: its numbers, and its tokens up to a bound, so that a page stays a page."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.rows import RecordPlace, ScoredRow, WorstToken

MAX_SHOWN_TOKENS = 400
MAX_TOKEN_CHARACTERS = 200
_CONTEXT_CHARACTERS = 120


class ShownToken(RecordPlace, WorstToken):
    """A worst token, bounded in length, with its record's place."""


class Excerpt(TypedDict):
    """Tokens of a response from `start` on: text, phi, log_prob and entropy of each."""

    start: int
    tokens: list[list[str | float]]


class ShownRecord(RecordPlace):
    """A record for people: its numbers, excerpts of its tokens, or its worst tokens where lists were not kept."""

    source: str | None
    num_tokens: int
    truncated: bool
    ends_turn: bool
    response_hash: str
    phi_mean: float
    phi_std: float
    log_prob_mean: float
    entropy_mean: float
    phi_below_5: float
    excerpts: list[Excerpt]
    worst_tokens: list[ShownToken]


def place_of(row: ScoredRow) -> RecordPlace:
    """The row's record."""
    return {"id": row["id"], "file": row["file"], "line": row["line"]}


def display_record(row: ScoredRow) -> ShownRecord:
    """A record whose response is shown whole, or in two excerpts: its beginning, and around its lowest phi."""
    excerpts = _excerpts(row)
    worst = [] if excerpts else row.get("worst_tokens") or []
    return {
        **place_of(row),
        "source": row.get("source"),
        "num_tokens": row["num_tokens"],
        "truncated": row["truncated"],
        "ends_turn": row["ends_turn"],
        "response_hash": row["response_hash"],
        "phi_mean": float(row["phi_mean"]),
        "phi_std": float(row["phi_std"]),
        "log_prob_mean": float(row["log_prob_mean"]),
        "entropy_mean": float(row["entropy_mean"]),
        "phi_below_5": float(row["phi_below_5"]),
        "excerpts": excerpts,
        "worst_tokens": [display_worst_token(row, token) for token in worst],
    }


def _excerpts(row: ScoredRow) -> list[Excerpt]:
    phi, log_prob, entropy = row.get("phi"), row.get("log_prob"), row.get("entropy")
    if phi is None or log_prob is None or entropy is None or not (len(phi) and len(log_prob) and len(entropy)):
        return []
    texts = row.get("tokens")
    if texts is None:
        texts = [f"⟨{token}⟩" for token in row.get("token_ids") or range(len(phi))]
    rounded = [[round(float(number), 4) for number in numbers] for numbers in (phi, log_prob, entropy)]
    tokens = [list(token) for token in zip(map(bounded, texts), *rounded, strict=True)]
    return [{"start": start, "tokens": tokens[start:stop]} for start, stop in _shown(np.asarray(phi, np.float64))]


def display_worst_token(row: ScoredRow, token: WorstToken) -> ShownToken:
    """A worst token of the row's record."""
    return {
        **place_of(row),
        "position": token["position"],
        "token_id": token["token_id"],
        "token": bounded(token["token"]),
        "context": (token.get("context") or "")[-_CONTEXT_CHARACTERS:],
        "phi": float(token["phi"]),
        "log_prob": float(token["log_prob"]),
        "entropy": float(token["entropy"]),
    }


def bounded(text: str) -> str:
    if len(text) <= MAX_TOKEN_CHARACTERS:
        return text
    return f"{text[:MAX_TOKEN_CHARACTERS]}… ({len(text):,} characters)"


def source_name(name: str | None, limit: int = 60) -> str:
    """How a source is called on the page."""
    text = "(none given)" if name is None else name if name.strip() else "(blank)"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(phi: NDArray[np.float64]) -> list[tuple[int, int]]:
    half = MAX_SHOWN_TOKENS // 2
    if len(phi) <= MAX_SHOWN_TOKENS:
        return [(0, len(phi))]
    worst = half + int(np.argmin(phi[half:]))
    start = min(max(half, worst - half // 2), len(phi) - half)
    if start == half:
        return [(0, MAX_SHOWN_TOKENS)]
    return [(0, half), (start, start + half)]

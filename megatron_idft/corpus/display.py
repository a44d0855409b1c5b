"""What of a record goes into a report: its numbers, and its tokens up to a bound, so that a page stays a page."""

from typing import Any

import numpy as np

MAX_SHOWN_TOKENS = 400
MAX_TOKEN_CHARACTERS = 200
_CONTEXT_CHARACTERS = 120


def display_record(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the record, `excerpts` of its tokens, and its worst tokens where the lists per token are absent.

    An excerpt is {"start": int, "tokens": [[text, phi, log_prob, entropy], …]}. A long response is shown in two: its
    beginning, and around the token with the lowest phi.
    """
    record = {key: row[key] for key in ("id", "file", "line", "num_tokens", "truncated", "ends_turn", "response_hash")}
    record["source"] = row.get("source")
    record |= {key: float(row[key]) for key in ("phi_mean", "phi_std", "log_prob_mean", "entropy_mean", "phi_below_5")}
    record["excerpts"], record["worst_tokens"] = [], []
    if any(row.get(key) is None or not len(row[key]) for key in ("phi", "log_prob", "entropy")):
        record["worst_tokens"] = [display_worst_token(row, token) for token in row.get("worst_tokens") or ()]
        return record
    texts = row.get("tokens")
    if texts is None:
        texts = [f"⟨{token}⟩" for token in row.get("token_ids") or range(len(row["phi"]))]
    for start, stop in _shown(np.asarray(row["phi"], dtype=np.float64)):
        numbers = zip(row["phi"][start:stop], row["log_prob"][start:stop], row["entropy"][start:stop], strict=True)
        tokens = [
            [bounded(text), *(round(float(number), 4) for number in three)]
            for text, three in zip(texts[start:stop], numbers, strict=True)
        ]
        record["excerpts"].append({"start": start, "tokens": tokens})
    return record


def display_worst_token(row: dict[str, Any], token: dict[str, Any]) -> dict[str, Any]:
    """A worst token, bounded in length, with its record's place."""
    shown = {key: row[key] for key in ("id", "file", "line")} | {"position": token["position"]}
    shown |= {"token_id": token["token_id"], "token": bounded(token["token"])}
    shown["context"] = (token.get("context") or "")[-_CONTEXT_CHARACTERS:]
    return shown | {key: float(token[key]) for key in ("phi", "log_prob", "entropy")}


def bounded(text: str) -> str:
    if len(text) <= MAX_TOKEN_CHARACTERS:
        return text
    return f"{text[:MAX_TOKEN_CHARACTERS]}… ({len(text):,} characters)"


def source_name(name: str | None, limit: int = 60) -> str:
    """How a source is called on the page."""
    text = "(none given)" if name is None else name if name.strip() else "(blank)"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(phi: Any) -> list[tuple[int, int]]:
    half = MAX_SHOWN_TOKENS // 2
    if len(phi) <= MAX_SHOWN_TOKENS:
        return [(0, len(phi))]
    worst = half + int(np.argmin(phi[half:]))
    start = min(max(half, worst - half // 2), len(phi) - half)
    if start == half:
        return [(0, MAX_SHOWN_TOKENS)]
    return [(0, half), (start, start + half)]

"""Statistics of one record's response under a model, from its tokens' log-probabilities and entropies.

phi = log p + H, in nats at temperature 1 (arXiv 2602.12222, section 2; statistics.py). Only trained tokens count: the
assistant's turns and the tokens that end them.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

PHI_THRESHOLDS = (-1.0, -3.0, -5.0)  # as in the training metrics, and in the authors' Hinted Decoding demo
WORST_TOKENS = 5
CONTEXT_TOKENS = 12  # before a worst token
Decode = Callable[[Sequence[int] | NDArray[np.integer]], str]
Integers = Sequence[int] | NDArray[np.int32]
Floats = Sequence[float] | NDArray[np.float32]


class RecordPlace(TypedDict):
    """Where a record stands."""

    id: str
    file: str
    line: int


class RecordOrigin(RecordPlace):
    """Which record a sample came from. Equal hashes are equal texts up to white space."""

    source: str | None
    truncated: bool
    prompt_hash: str
    response_hash: str


class WorstToken(TypedDict):
    """One of the tokens of a response with the lowest phi.

    Attributes:
        context: the text before it.
    """

    position: int
    token_id: int
    token: str
    context: str
    phi: float
    log_prob: float
    entropy: float


class TokenStatistics(TypedDict, total=False):
    """Lists with an entry per response token, those of the top K with K, absent where they were not kept."""

    positions: Integers
    token_ids: Integers
    tokens: Sequence[str]
    log_prob: Floats
    entropy: Floats
    phi: Floats
    top_token_ids: Integers
    top_log_prob: Floats


class ResponseStatistics(TokenStatistics):
    """The statistics of a response under the model."""

    num_prompt_tokens: int
    num_tokens: int
    ends_turn: bool
    template_markers: int
    prompt_overlap: float
    log_prob_mean: float
    log_prob_sum: float
    entropy_mean: float
    phi_mean: float
    phi_std: float
    phi_sum: float
    phi_below_1: float
    phi_below_3: float
    phi_below_5: float
    worst_tokens: list[WorstToken]


class ScoredRow(RecordOrigin, ResponseStatistics):
    """A row of `TOKEN_SCHEMA`, or of `RECORD_SCHEMA` where it has no lists.

    Attributes:
        index: of the sample in the corpus.
    """

    index: int


_WORST = pa.struct(
    [
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("context", pa.string()),
        ("phi", pa.float32()),
        ("log_prob", pa.float32()),
        ("entropy", pa.float32()),
    ]
)
RECORD_FIELDS = [
    ("index", pa.int64()),
    ("id", pa.string()),
    ("file", pa.string()),
    ("line", pa.int64()),
    ("source", pa.string()),
    ("num_prompt_tokens", pa.int32()),
    ("num_tokens", pa.int32()),
    ("truncated", pa.bool_()),
    ("ends_turn", pa.bool_()),
    ("prompt_hash", pa.string()),
    ("response_hash", pa.string()),
    ("template_markers", pa.int32()),
    ("prompt_overlap", pa.float32()),
    ("log_prob_mean", pa.float64()),
    ("log_prob_sum", pa.float64()),
    ("entropy_mean", pa.float64()),
    ("phi_mean", pa.float64()),
    ("phi_std", pa.float64()),
    ("phi_sum", pa.float64()),
    ("phi_below_1", pa.float64()),
    ("phi_below_3", pa.float64()),
    ("phi_below_5", pa.float64()),
    ("worst_tokens", pa.list_(_WORST)),
]
TOKEN_FIELDS = [
    ("positions", pa.list_(pa.int32())),
    ("token_ids", pa.list_(pa.int32())),
    ("tokens", pa.list_(pa.string())),
    ("log_prob", pa.list_(pa.float32())),
    ("entropy", pa.list_(pa.float32())),
    ("phi", pa.list_(pa.float32())),
]
RECORD_SCHEMA = pa.schema(RECORD_FIELDS)
TOKEN_SCHEMA = pa.schema(RECORD_FIELDS + TOKEN_FIELDS)
TOP_FIELDS = [("top_token_ids", pa.list_(pa.int32())), ("top_log_prob", pa.list_(pa.float32()))]
TOP_SCHEMA = pa.schema(RECORD_FIELDS + TOKEN_FIELDS + TOP_FIELDS)


def scored_record(
    ids: NDArray[np.int32],
    mask: NDArray[np.uint8],
    log_prob: NDArray[np.float32],
    entropy: NDArray[np.float32],
    *,
    decode: Decode,
    end_of_turn_ids: Collection[int],
    special_ids: Collection[int],
) -> ResponseStatistics:
    """The statistics of one response. Sums are float64. phi_std is that of the tokens, not of the mean.

    Args:
        ids: [n] token ids of the conversation.
        mask: [n], 1 where the token is trained.
        log_prob: [n - 1] fp32, of token t + 1 given those up to t. Read where mask[1:] is 1.
        entropy: the same.
        decode: token ids -> text.
        end_of_turn_ids: the tokens that end assistant turns in this corpus.
        special_ids: all tokens that templates write, such as chat markers.

    Raises:
        FloatingPointError: the statistics are not finite.
    """
    positions = np.flatnonzero(mask[1:]) + 1
    tokens = ids[positions]
    log_p, h = log_prob[positions - 1].astype(np.float64), entropy[positions - 1].astype(np.float64)
    phi = log_p + h
    worst = np.argsort(phi, kind="stable")[:WORST_TOKENS]
    last_of_spans = np.append(np.diff(positions) > 1, True)
    markers = np.isin(tokens, list(special_ids)) & ~last_of_spans
    row: ResponseStatistics = {
        "num_prompt_tokens": int(positions[0]),
        "num_tokens": len(positions),
        "ends_turn": int(tokens[-1]) in end_of_turn_ids,
        "template_markers": int(markers.sum()),
        "prompt_overlap": _repeated_prompt(ids[: positions[0]], tokens) / len(tokens),
        "log_prob_mean": float(log_p.mean()),
        "log_prob_sum": float(log_p.sum()),
        "entropy_mean": float(h.mean()),
        "phi_mean": float(phi.mean()),
        "phi_std": float(phi.std()),
        "phi_sum": float(phi.sum()),
        "phi_below_1": float((phi < PHI_THRESHOLDS[0]).mean()),
        "phi_below_3": float((phi < PHI_THRESHOLDS[1]).mean()),
        "phi_below_5": float((phi < PHI_THRESHOLDS[2]).mean()),
        "worst_tokens": [
            {
                "position": int(positions[i]),
                "token_id": int(tokens[i]),
                "token": decode(tokens[i : i + 1]),
                "context": decode(ids[max(0, positions[i] - CONTEXT_TOKENS) : positions[i]]),
                "phi": float(phi[i]),
                "log_prob": float(log_p[i]),
                "entropy": float(h[i]),
            }
            for i in worst
        ],
        "positions": positions.astype(np.int32),
        "token_ids": tokens.astype(np.int32),
        "tokens": [decode(tokens[i : i + 1]) for i in range(len(tokens))],
        "log_prob": log_p.astype(np.float32),
        "entropy": h.astype(np.float32),
        "phi": phi.astype(np.float32),
    }
    if not (math.isfinite(row["log_prob_mean"]) and math.isfinite(row["entropy_mean"])):
        raise FloatingPointError("the model gives NaN or infinite logits for this record")
    return row


def top_columns(mask: NDArray[np.uint8], *top: NDArray[Any]) -> TokenStatistics:
    """The most probable tokens in the places of a response's, K for each of them, one place after the other.

    Args:
        mask: [n], 1 where the token is trained.
        top: their ids and their log-probabilities [n - 1, K]; nothing gives no columns.
    """
    if not top:
        return {}
    ids, log_prob = (values[mask[1:] != 0].ravel() for values in top)
    return {"top_token_ids": ids, "top_log_prob": log_prob}


def _repeated_prompt(prompt: NDArray[np.int32], response: NDArray[np.int32]) -> int:
    """The length of the longest beginning of the response that stands in the prompt, word for word."""
    longest = 0
    for start in np.flatnonzero(prompt == response[0]):
        there = prompt[start : start + len(response)]
        differs = np.flatnonzero(there != response[: len(there)])
        longest = max(longest, int(differs[0]) if len(differs) else len(there))
    return longest

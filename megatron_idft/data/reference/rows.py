"""One record's numbers of a reference model, and their way to the record's tokens: each trained one gets its own."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.data.reference.columns import LOWEST_FLOAT16, ReferenceColumns

_MASS = 1.001  # that the probabilities of the most probable tokens may add up to, for their rounding


class ScoreFault(Exception):
    """Numbers that do not belong to the record, or cannot be right.

    Args:
        column: of the scores.
        reason: with the remedy.
    """

    def __init__(self, column: str, reason: str):
        super().__init__(column, reason)
        self.column, self.reason = column, reason


@dataclass(slots=True)
class ScoreRow:
    """A record's scores, as they were read. m is how many tokens of it have any.

    Attributes:
        log_prob: [m], log q in nats.
        positions: [m] of the tokens in the conversation, rising; None: m is the number of trained tokens.
        token_ids: [m]; None: they are not compared.
        entropy: [m]; None where it is not known.
        top_token_ids: [m K], of each the K most probable tokens, one after the other; None where they are not known.
        top_log_prob: [m K], their log q.
        truncated: the conversation was cut before it was scored.
    """

    log_prob: NDArray[Any]
    positions: NDArray[Any] | None = None
    token_ids: NDArray[Any] | None = None
    entropy: NDArray[Any] | None = None
    top_token_ids: NDArray[Any] | None = None
    top_log_prob: NDArray[Any] | None = None
    truncated: bool = False


def columns_of(
    row: ScoreRow, ids: NDArray[np.int32], trained: NDArray[np.integer], most: int, wanted: ReferenceColumns
) -> dict[str, NDArray[Any]]:
    """The columns of a record, [n] or [n, K] each, 0 where a token is not trained.

    Args:
        row: its scores.
        ids: [n], those of its tokens that are kept.
        trained: their positions.
        most: how many were trained before the record was cut.
        wanted: the columns.

    Raises:
        ScoreFault: a trained token has no number, that of another token, or one that cannot be right.
    """
    at = _places(row, trained, most)
    if row.token_ids is not None:
        other = np.flatnonzero(row.token_ids[at] != ids[trained])
        if len(other):
            position = int(trained[other[0]])
            raise ScoreFault(
                "token_ids",
                f"the scores have token {row.token_ids[at[other[0]]]} at position {position}, the record"
                f" {ids[position]}: they were made with another tokenizer, template or text",
            )
    found: dict[str, NDArray[Any]] = {"log_prob": _log_prob("log_prob", row.log_prob[at], trained)}
    if wanted.entropy:
        found["entropy"] = _entropy(row.entropy, at, trained)
    if wanted.top_k:
        found["top_ids"], found["top_log_prob"] = _top(row, at, trained, wanted.top_k)
    columns = {}
    for name, shape in wanted.shapes.items():
        columns[name] = np.zeros((len(ids), *shape), wanted.dtype_of(name))
        values = found[name]
        if columns[name].dtype == np.float16:
            values = np.clip(values, LOWEST_FLOAT16, -LOWEST_FLOAT16)
        columns[name][trained] = values
    return columns


def _places(row: ScoreRow, trained: NDArray[np.integer], most: int) -> NDArray[np.integer]:
    """Which of the row's numbers each trained token has."""
    have = len(row.log_prob)
    if row.positions is None:
        if not len(trained) <= have <= most:
            raise ScoreFault("log_prob", f"{have} numbers for {most} trained tokens, expected one for each")
        return np.arange(len(trained))
    if have != len(row.positions) or (np.diff(row.positions) <= 0).any():
        raise ScoreFault("positions", f"expected {have} rising positions, one for each number")
    at = np.searchsorted(row.positions, trained)
    missing = np.flatnonzero(np.append(row.positions, -1)[at] != trained)
    if len(missing):
        why = "they were made with another mask, template or tokenizer, or with --sft-last-turn-only"
        if row.truncated:
            why = "they were cut at a shorter --seq-length; score again with this one"
        raise ScoreFault(
            "positions",
            f"{len(missing)} of {len(trained)} trained tokens have no score, the first at position"
            f" {trained[missing[0]]}: {why}",
        )
    return at


def _log_prob(column: str, values: NDArray[Any], trained: NDArray[np.integer]) -> NDArray[Any]:
    bad = np.argwhere(~(values <= 0) | np.isinf(values))
    if len(bad):
        raise ScoreFault(
            column,
            f"{values[tuple(bad[0])]} at position {trained[bad[0][0]]} is no log-probability: expected a finite number"
            " of at most 0, in nats, for every trained token",
        )
    return values


def _entropy(entropy: NDArray[Any] | None, at: NDArray[np.integer], trained: NDArray[np.integer]) -> NDArray[Any]:
    if entropy is None:
        raise ScoreFault(
            "entropy", "missing, but --sft-reference-entropy asks for it: give the column or drop the flag"
        )
    values: NDArray[Any] = entropy[at]
    bad = np.flatnonzero(~(values >= 0) | np.isinf(values))
    if len(bad):
        raise ScoreFault(
            "entropy",
            f"{values[bad[0]]} at position {trained[bad[0]]} is no entropy: expected a finite number of at least 0, in"
            " nats, for every trained token",
        )
    return values


def _top(
    row: ScoreRow, at: NDArray[np.integer], trained: NDArray[np.integer], top_k: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and log q of the first K of each trained token, the most probable first, of equals the lowest id."""
    column, have = "top_log_prob", len(row.log_prob)
    none = np.empty(0)
    ids, values = (none if flat is None else flat for flat in (row.top_token_ids, row.top_log_prob))
    if ids.size != values.size or ids.size % have:
        raise ScoreFault(
            column, f"{values.size} numbers and {ids.size} ids for {have} tokens, expected K of both for each"
        )
    there = ids.size // have
    if there < top_k:
        raise ScoreFault(
            column, f"{there} a token, fewer than --sft-reference-top-k {top_k}: give more, or ask for fewer"
        )
    ids = ids.reshape(have, there)[at]
    values = _log_prob(column, values.reshape(have, there)[at], trained)
    order = np.lexsort((ids, -values), axis=-1)[:, :top_k]
    ids, values = np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)
    ordered = np.sort(ids, -1)
    twice = (np.diff(ordered, axis=-1) == 0).any(-1) | (ordered[:, 0] < 0)
    heavy = np.exp(values.astype(np.float64)).sum(-1) > _MASS
    if (twice | heavy).any():
        place = int(np.argmax(twice | heavy))
        what = "ids are negative or come twice" if twice[place] else "probabilities add up to more than 1"
        raise ScoreFault(column, f"the {what} at position {trained[place]}")
    return ids, values

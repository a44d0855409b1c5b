"""A reference model's numbers that stand in the records themselves."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import Record
from megatron_idft.data.reference.parts import LISTS
from megatron_idft.data.reference.rows import ScoreFault, ScoreRow

OWN = "reference_"  # before the names of the columns in LISTS: those of a record


@dataclass(slots=True)
class Kept:
    """A record as its tokens.

    Attributes:
        record: with its columns.
        ids: [n] int32, of the tokens that are kept.
        trained: the positions of those that are trained; none: it is left out, and has no need of scores.
        before: how many tokens it had before any was cut off.
        trained_before: how many of these were trained.
    """

    record: Record
    ids: NDArray[np.int32]
    trained: NDArray[np.integer]
    before: int
    trained_before: int


def own_row(kept: Kept) -> ScoreRow:
    """The numbers that a record brings: one for each token of the conversation, or for each trained one.

    Raises:
        ScoreFault: names the column that cannot be used.
    """
    extra = kept.record.extra
    brought = {name: extra[OWN + name] for name in LISTS if extra.get(OWN + name) is not None}
    values: dict[str, Any] = {name: _numbers(name, value) for name, value in brought.items()}
    if "log_prob" not in values:
        raise ScoreFault("log_prob", "missing: give one number for each token, or for each trained one")
    have = len(values["log_prob"])
    for name, column in values.items():
        if not name.startswith("top") and len(column) != have:
            raise ScoreFault(name, f"{len(column)} values beside {have} of {OWN}log_prob")
    row = ScoreRow(**values)
    if row.positions is None and have == kept.before:  # never the number of the trained ones: the first token is not
        row.positions = np.arange(have)
    return row


def _numbers(name: str, values: Any) -> NDArray[Any]:
    """A list of numbers, or of lists of as many: what is null is NaN."""
    kind = np.int64 if name.endswith("token_ids") else np.float32
    try:
        if not isinstance(values, list):
            raise TypeError
        return np.nan_to_num(np.array(values, dtype=np.float64), nan=-1 if kind is np.int64 else np.nan).astype(kind)
    except (TypeError, ValueError, OverflowError):
        raise ScoreFault(name, "expected a list of numbers, one for each token, or K for each") from None

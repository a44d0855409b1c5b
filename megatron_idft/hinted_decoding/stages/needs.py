"""What a turn needs next, and generators that ask for it.

The stages of a record are a generator: it yields a need and is resumed with the answer. So a scheduler may run any
number of records side by side, whichever stages they are in. All tensor-parallel ranks must answer the same needs in
the same order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_idft.hinted_decoding.stages.candidates import Floats
from megatron_idft.inference.requests import Completion, DecodeSettings, Request, Tokens


@dataclass(frozen=True, slots=True)
class Decode:
    """Responses to decode. The answer: their completions, in the order of the requests.

    Attributes:
        stage: its name, for who watches.
        turn: the number of the turn in its record.
        place: of the stage in the turn's chain, from 0. A scheduler that decodes one batch at a time takes the smallest
            (turn, place) first.
    """

    requests: Sequence[Request]
    settings: DecodeSettings
    stage: str
    turn: int
    place: int


@dataclass(frozen=True, slots=True)
class Score:
    """Sequences to score. The answer: log_prob and entropy of each, fp32 [n - 1], finite."""

    sequences: Sequence[Tokens]


@dataclass(frozen=True, slots=True)
class Verify:
    """(text, reference) pairs to compare. The answer: a verdict on each."""

    items: Sequence[tuple[str, Any]]


class Verdict(NamedTuple):
    """As in corpus.verification.Verification, in plain types that ranks can share."""

    verdict: str
    verified_by: str | None
    extracted: str | None
    reason: str | None = None


Need = Decode | Score | Verify
type Steps[T] = Generator[Need, Any, T]


def decode(need: Decode) -> Steps[list[Completion]]:
    """The completions of the need's requests."""
    completions: list[Completion] = (yield need) if need.requests else []
    return completions


def score(sequences: Sequence[Tokens]) -> Steps[list[tuple[Floats, Floats]]]:
    """log_prob and entropy of each sequence."""
    found: list[tuple[Floats, Floats]] = (yield Score(sequences)) if sequences else []
    return found


def verify(items: Sequence[tuple[str, Any]]) -> Steps[list[Verdict]]:
    """The verdict on each text."""
    found: list[Verdict] = (yield Verify(items)) if items else []
    return found

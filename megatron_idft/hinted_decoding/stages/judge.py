"""Which candidates are accepted: verified on one rank, decided the same on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verification
from megatron_idft.hinted_decoding.output.outcomes import Rejection
from megatron_idft.hinted_decoding.stages.candidates import Candidate
from megatron_idft.hinted_decoding.stages.tasks import Turn


class Verifies(Protocol):
    """The part of corpus.verification.Verifier that is needed here."""

    def verify(self, items: Sequence[tuple[str, Any]]) -> list[Verification]: ...


class Judge:
    """Decides about the candidates of a stage; the same on every rank.

    Args:
        verifier: on the leading rank; None on the others.
        leaks: finds phrases that betray a hint.
        accept_unverified: also accept candidates that cannot be verified.
        share, leads: see Realigner.
    """

    def __init__(
        self,
        verifier: Verifies | None,
        leaks: LeakFilter,
        *,
        accept_unverified: bool,
        share: Callable[[Any], Any],
        leads: bool,
    ):
        self._verifier, self._leaks, self._accept_unverified = verifier, leaks, accept_unverified
        self._share, self._leads = share, leads

    def __call__(self, made: Sequence[tuple[Turn, Candidate]], *, hinted: bool = False) -> None:
        """Add the candidates of one stage to their turns, and accept at most one for each turn.

        The first right one is accepted; where the turn has no reference, the first possible one, if such are accepted.

        Args:
            made: candidates with their turns.
            hinted: they were written with a hint in view, which they must not betray.
        """
        for turn, candidate in made:
            turn.candidates.append(candidate)
            candidate.extracted = final_answer(candidate.text)
            if hinted:
                candidate.leak = self._leaks.find(candidate.text, turn.question)
        self._verify(made)
        for _, candidate in made:
            candidate.rejected_because = self._rejection(candidate)
        for turn, candidate in made:
            if turn.accepted is None and candidate.rejected_because is None:
                candidate.accepted = candidate.verdict == "right" or turn.reference is None

    def accept_unknown(self, turn: Turn) -> None:
        """After all stages: accept the first candidate that was not rejected, for want of a better one."""
        if turn.accepted is None:
            for candidate in turn.candidates:
                if candidate.rejected_because is None:
                    candidate.accepted = True
                    return

    def _rejection(self, candidate: Candidate) -> Rejection | None:
        if not candidate.finished:
            return "unfinished"
        if candidate.leak is not None:
            return "leak"
        if candidate.verdict == "wrong":
            return "wrong"
        return None if candidate.verdict == "right" or self._accept_unverified else "unverified"

    def _verify(self, made: Sequence[tuple[Turn, Candidate]]) -> None:
        compared = [(turn, c) for turn, c in made if turn.reference is not None and c.finished]
        if not compared:
            return
        found: Any = None
        if self._leads:
            assert self._verifier is not None
            items = [(candidate.text, turn.reference) for turn, candidate in compared]
            found = [(str(v.verdict), v.verified_by, v.extracted) for v in self._verifier.verify(items)]
        for (_, candidate), verification in zip(compared, self._share(found), strict=True):
            candidate.verdict, candidate.verified_by, candidate.extracted = verification

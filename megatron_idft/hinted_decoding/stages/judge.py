"""Which candidates of a turn are accepted."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.hinted_decoding.output.outcomes import Rejection
from megatron_idft.hinted_decoding.stages.candidates import Candidate
from megatron_idft.hinted_decoding.stages.model_judge import ModelJudge
from megatron_idft.hinted_decoding.stages.needs import Steps, verify
from megatron_idft.hinted_decoding.stages.tasks import Turn


class Judge:
    """Decides about the candidates of a stage.

    Args:
        leaks: finds phrases that betray a hint.
        accept_unverified: also accept candidates that cannot be verified.
        bare_below: reject candidates that were written with a hint in view and have less than this share of the
            original's tokens: a model that is shown an answer may write the answer and nothing else.
        model: asks the model about candidates that nothing else can decide about; None: they stay undecided.
    """

    def __init__(
        self,
        leaks: LeakFilter,
        *,
        accept_unverified: bool,
        bare_below: float = 0.0,
        model: ModelJudge | None = None,
    ):
        self._leaks, self._accept_unverified, self._model = leaks, accept_unverified, model
        self._bare_below = bare_below

    def can_decide(self, turn: Turn) -> bool:
        """Whether candidates of this turn can be found right at all."""
        return turn.reference is not None or self._model is not None

    def judge(self, turn: Turn, made: Sequence[Candidate]) -> Steps[None]:
        """Add the candidates of one stage to their turn, and accept at most one.

        The first right one is accepted; where nothing can decide about the turn, the first possible one, if such are
        accepted.

        Args:
            turn: whose candidates they are.
            made: the candidates. Those that were written with a hint in view must not betray it.
        """
        for candidate in made:
            turn.candidates.append(candidate)
            candidate.extracted = final_answer(candidate.text)
            if candidate.stage != "rollout":
                candidate.leak = self._leaks.find(candidate.text, turn.question)
        compared = [candidate for candidate in made if turn.reference is not None and candidate.finished]
        verdicts = yield from verify([(candidate.text, turn.reference) for candidate in compared])
        for candidate, found in zip(compared, verdicts, strict=True):
            candidate.verdict, candidate.verified_by, candidate.extracted, reason = found
            candidate.undecided_because = reason if candidate.verdict == "unknown" else None
        if self._model is not None:
            undecided = [c for c in made if c.finished and c.leak is None and c.verdict in (None, "unknown")]
            yield from self._model.judge(turn, undecided)
        for candidate in made:
            candidate.rejected_because = self._rejection(turn, candidate)
            if turn.accepted is None and candidate.rejected_because is None:
                candidate.accepted = candidate.verdict == "right" or not self.can_decide(turn)

    def accept_unknown(self, turn: Turn) -> None:
        """After all stages: accept the first candidate that was not rejected, for want of a better one."""
        if turn.accepted is None:
            for candidate in turn.candidates:
                if candidate.rejected_because is None:
                    candidate.accepted = True
                    return

    def _rejection(self, turn: Turn, candidate: Candidate) -> Rejection | None:
        if not candidate.finished:
            return "unfinished"
        if candidate.leak is not None:
            return "leak"
        if candidate.verdict == "wrong":
            return "wrong"
        if candidate.stage != "rollout" and self._is_bare(turn, candidate):
            return "bare"
        return None if candidate.verdict == "right" or self._accept_unverified else "unverified"

    def _is_bare(self, turn: Turn, candidate: Candidate) -> bool:
        end = len(turn.prompt.end_ids)  # the same in both, with the calls of the turn
        return len(candidate.response_ids) - end < self._bare_below * (len(turn.prompt.original_ids) - end)

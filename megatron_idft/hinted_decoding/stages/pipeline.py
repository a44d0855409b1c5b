"""Records in, outcomes out: each record is a generator that goes turn by turn through the stages of chain.py.

All tensor-parallel ranks run this with the same records and make the same calls of the engine. Verification runs in
processes of the leading rank, which shares the verdicts; all else is the same on every rank by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.chain import Chain, longest_chain
from megatron_idft.hinted_decoding.stages.judge import Judge
from megatron_idft.hinted_decoding.stages.model_judge import ModelJudge
from megatron_idft.hinted_decoding.stages.needs import Steps
from megatron_idft.hinted_decoding.stages.progress import StageProgress
from megatron_idft.hinted_decoding.stages.scheduler import Engine, Scheduler, Verifies
from megatron_idft.hinted_decoding.stages.tasks import RealignInput, RecordTask


class Realigner:
    """Realigns records; keeps nothing between calls.

    Args:
        engine: decodes and scores.
        tokenizer: of the model.
        settings: of the job.
        verifier: on the leading rank; None on the others.
        leaks: finds phrases that betray a hint.
        provenance: model and versions of the job, written into the kept records.
        share: a broadcast: the leading rank's value on all ranks that hold the model together.
        leads: whether this is the leading rank.
        rejected_texts: keep the texts of analyses and rejected candidates in the outcomes.

    Attributes:
        progress: how far the records of the call are.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        settings: RealignSettings,
        verifier: Verifies | None,
        leaks: LeakFilter,
        provenance: Mapping[str, Any],
        *,
        share: Callable[[Any], Any] = lambda value: value,
        leads: bool = True,
        rejected_texts: bool = True,
    ):
        self._tokenizer, self._settings = tokenizer, settings
        threshold = settings.model_judge_threshold
        model = None if threshold is None else ModelJudge(tokenizer, threshold, settings.max_positions)
        unverified = settings.unverified == "keep"
        judge = Judge(leaks, accept_unverified=unverified, bare_below=settings.bare_below, model=model)
        self._chain = Chain(settings, tokenizer, judge)
        prompt = {} if settings.regenerate else {"prompt": settings.templates[0].sha256}
        self._provenance = {**provenance, **prompt}
        self._rejected_texts = rejected_texts
        self._fingerprint = tokenizer.fingerprint()
        self.progress = StageProgress(longest_chain(settings), lambda: engine.decoded_tokens)
        self._scheduler = Scheduler(engine, verifier, self.progress, share=share, leads=leads)

    def realign(self, records: Sequence[RealignInput]) -> list[OutcomeRow]:
        """The outcomes of `records`, in their order; the error of a record stands in its row."""
        chunks = iter([(0, records)] if records else [])
        return [row for _, rows in self.realign_chunks(lambda: next(chunks, None)) for row in rows]

    def realign_chunks(
        self, more: Callable[[], tuple[int, Sequence[RealignInput]] | None]
    ) -> Iterator[tuple[int, list[OutcomeRow]]]:
        """Yield chunks with their outcomes, each when all its records have one.

        Args:
            more: gives the next chunk, a number and at least one record, when there is room for responses beside
                those that the records at hand need, and a record of the chunk before has ended: a launch whose rows
                would hold many chunks leaves them to others. None: there is none for now. The iterator ends when
                there is none and none is at hand.
        """
        chunks: dict[int, _Chunk] = {}  # by the numbers of their records

        def begin() -> list[Steps[None]]:
            newest = next(reversed(chunks.values()), None)
            if newest is not None and not newest.has_an_end:
                return []
            given = more()
            if given is None:
                return []
            tasks = [self._task(record) for record in given[1]]
            chunk, first = _Chunk(given[0], tasks, len(tasks)), self._begun
            self._begun += len(tasks)
            self.progress.begin(len(tasks), chunk.turns)
            chunks.update(dict.fromkeys(range(first, self._begun), chunk))
            return [self._steps(first + i, task, chunk) for i, task in enumerate(tasks)]

        self._begun = 0
        for ended in self._scheduler.run(begin):
            chunk = chunks.pop(ended)
            chunk.missing -= 1
            if not chunk.missing:
                self.progress.end(len(chunk.tasks), chunk.turns)
                yield chunk.number, [self._row(task) for task in chunk.tasks]

    def _task(self, given: RealignInput) -> RecordTask:
        settings = self._settings
        compared = not settings.regenerate or settings.only_right
        return RecordTask(
            given, self._tokenizer, settings.max_positions, open_end=settings.regenerate, compared=compared
        )

    def _row(self, task: RecordTask) -> OutcomeRow:
        return task.row(self._provenance, self._fingerprint, rejected_texts=self._rejected_texts)

    def _steps(self, record: int, task: RecordTask, chunk: _Chunk) -> Steps[None]:
        """The turns of a record, one after the other, until one ends it."""
        for number in range(task.num_turns):
            turn = task.begin(number)
            if turn is None:
                break
            yield from self._chain.run(turn)
            task.settle(turn)
            self.progress.settle(record, 1)
        self.progress.settle(record, task.num_turns - len(task.turns))
        chunk.has_an_end = True


@dataclass(slots=True)
class _Chunk:
    """missing: records whose end was not looked at yet. has_an_end: a record has ended."""

    number: int
    tasks: list[RecordTask]
    missing: int
    has_an_end: bool = False

    @property
    def turns(self) -> int:
        return sum(task.num_turns for task in self.tasks)

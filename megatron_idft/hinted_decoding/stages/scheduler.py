"""A scheduler that runs any number of records side by side, each in whatever stage it is.

The decode engine asks for a response whenever it has room for one, and gets that of the record that began first. Where
none waits, whatever is to be scored or verified is, all at once, and where that brings no response either, further
records begin. All ranks are asked at the same points, so all decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any, Protocol

import numpy as np

from megatron_idft.corpus.verification.verifier import Verification
from megatron_idft.errors import NonFiniteLogitsError
from megatron_idft.hinted_decoding.stages.candidates import Floats
from megatron_idft.hinted_decoding.stages.needs import Decode, Score, Steps, Verdict, Verify
from megatron_idft.hinted_decoding.stages.progress import StageProgress
from megatron_idft.inference.requests import Completion, Request, Tokens

# Where no further record could begin, so many questions of the engine pass before that is tried again: it costs a look
# into the ledger's folder, and a broadcast.
_QUESTIONS_BETWEEN = 64


class Engine(Protocol):
    """The part of inference.engine.DecodeEngine that is needed here."""

    @property
    def decoded_tokens(self) -> int: ...

    def serve(self, feed: Callable[[], Request | None]) -> Iterator[Completion]: ...

    def score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]: ...


class Verifies(Protocol):
    """The part of corpus.verification.Verifier that is needed here."""

    def verify(self, items: Sequence[tuple[str, Any]]) -> list[Verification]: ...


@dataclass(slots=True)
class _Writing:
    """The responses that a generator waits for."""

    need: Decode
    completions: list[Completion | None]
    missing: int


class Scheduler:
    """Answers what generators need, until they end.

    Args:
        engine: decodes and scores.
        verifier: on the leading rank; None on the others.
        progress: is told what happens.
        share, leads: see Realigner.
    """

    def __init__(
        self,
        engine: Engine,
        verifier: Verifies | None,
        progress: StageProgress,
        *,
        share: Callable[[Any], Any],
        leads: bool,
    ):
        self._engine, self._verifier, self._progress = engine, verifier, progress
        self._share, self._leads = share, leads

    def run(self, begin: Callable[[], Sequence[Steps[None]]]) -> Iterator[int]:
        """Run generators to their ends, and yield the number of each one that has ended.

        Args:
            begin: asked for further generators, which are numbered from 0 as they come; none: there are none for now.
                The iterator ends when there are none and all that began have ended.
        """
        self._begin, self._count, self._pause = begin, 0, 0
        self._work: dict[int, Steps[None]] = {}
        self._scores: dict[int, Score] = {}
        self._verifies: dict[int, Verify] = {}
        self._writing: dict[int, _Writing] = {}
        self._waiting: list[tuple[int, int]] = []  # a heap of (generator, response)
        self._asked: dict[int, tuple[int, int]] = {}  # by the identity of the request
        self._ended: list[int] = []
        for completion in self._engine.serve(self._feed):
            self._take(completion)
            yield from self._pop_ended()
        yield from self._pop_ended()

    def _pop_ended(self) -> list[int]:
        ended, self._ended = self._ended, []
        return ended

    def _feed(self) -> Request | None:
        """The next response to write; None: nothing for now."""
        while not self._waiting:
            if not self._answer_scores() and not self._answer_verifies() and not self._begin_more():
                return None
        number, place = heappop(self._waiting)
        need = self._writing[number].need
        request = replace(need.requests[place], settings=need.settings)
        self._asked[id(request)] = number, place
        return request

    def _take(self, completion: Completion) -> None:
        number, place = self._asked.pop(id(completion.request))
        writing = self._writing[number]
        writing.completions[place] = completion
        writing.missing -= 1
        self._progress.wrote(number, writing.need.stage)
        if not writing.missing:
            del self._writing[number]
            self._resume(number, writing.completions)

    def _begin_more(self) -> bool:
        if self._asked and self._pause:
            self._pause -= 1
            return False
        begun = self._begin()
        self._pause = 0 if begun else _QUESTIONS_BETWEEN
        for steps in begun:
            self._work[self._count] = steps
            self._count += 1
            self._resume(self._count - 1, None)
        return bool(begun)

    def _resume(self, number: int, answer: Any) -> None:
        try:
            need = self._work[number].send(answer)
        except StopIteration:
            del self._work[number]
            self._ended.append(number)
            self._pause = 0
            return
        if isinstance(need, Score):
            self._scores[number] = need
        elif isinstance(need, Verify):
            self._verifies[number] = need
        else:
            self._writing[number] = _Writing(need, [None] * len(need.requests), len(need.requests))
            self._progress.enter(number, need.stage, need.place, len(need.requests))
            for place in range(len(need.requests)):
                heappush(self._waiting, (number, place))

    def _answer_scores(self) -> bool:
        """Whether there was anything to score."""
        needs, self._scores = sorted(self._scores.items()), {}
        if needs:
            self._progress.doing = "scoring"
            sequences = [need.sequences for _, need in needs]
            found = self._score([sequence for part in sequences for sequence in part])
            self._progress.doing = ""
            for (number, _), answer in zip(needs, _divided(found, sequences), strict=True):
                self._resume(number, answer)
        return bool(needs)

    def _score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]:
        found = self._engine.score(sequences)
        if not all(np.isfinite(values).all() for pair in found for values in pair):
            raise NonFiniteLogitsError(
                "the model gives NaN or infinite logits for the records of this chunk: check the checkpoint, and its"
                " precision (--bf16, --fp16)"
            )
        return found

    def _answer_verifies(self) -> bool:
        """Whether there was anything to verify."""
        needs, self._verifies = sorted(self._verifies.items()), {}
        if needs:
            self._progress.doing = "verifying"
            items = [need.items for _, need in needs]
            found = self._verify([item for part in items for item in part])
            self._progress.doing = ""
            for (number, _), answer in zip(needs, _divided(found, items), strict=True):
                self._resume(number, answer)
        return bool(needs)

    def _verify(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Verification runs in processes of the leading rank, which shares the verdicts."""
        found: Any = None
        if self._leads:
            assert self._verifier is not None
            found = [(str(v.verdict), v.verified_by, v.extracted, v.reason) for v in self._verifier.verify(items)]
        return [Verdict(*verdict) for verdict in self._share(found)]


def _divided[T](values: Sequence[T], parts: Sequence[Sequence[Any]]) -> list[list[T]]:
    """`values`, in as many pieces as `parts`, and of their lengths."""
    rest = iter(values)
    return [[next(rest) for _ in part] for part in parts]

"""A scheduler that runs records side by side in rounds, each of which answers one kind of need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_idft.corpus.verification.verifier import Verification
from megatron_idft.errors import NonFiniteLogitsError
from megatron_idft.hinted_decoding.stages.candidates import Floats
from megatron_idft.hinted_decoding.stages.needs import Decode, Need, Score, Steps, Verdict, Verify
from megatron_idft.hinted_decoding.stages.progress import StageProgress
from megatron_idft.inference.requests import Completion, DecodeSettings, Request, Tokens


class Engine(Protocol):
    """The part of inference.engine.DecodeEngine that is needed here."""

    @property
    def decoded_tokens(self) -> int: ...

    def decode(self, requests: Sequence[Request], settings: DecodeSettings) -> Iterator[Completion]: ...

    def score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]: ...


class Verifies(Protocol):
    """The part of corpus.verification.Verifier that is needed here."""

    def verify(self, items: Sequence[tuple[str, Any]]) -> list[Verification]: ...


class Lockstep:
    """Answers needs in rounds: whatever is to be scored or verified first, then one batch of responses.

    Of the responses, those of the earliest stage come first, as far as they share their settings: so records that went
    through fewer stages catch up with the others, and batches are as large as can be.

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

    def run(self, work: Sequence[Steps[None]]) -> None:
        """Run all generators to their ends."""
        waiting: dict[int, Need] = {}  # by the number of the generator

        def resume(number: int, answer: Any) -> None:
            try:
                waiting[number] = work[number].send(answer)
            except StopIteration:
                waiting.pop(number, None)

        for number in range(len(work)):
            resume(number, None)
        while waiting:
            chosen = _choose(waiting)
            for number, answer in zip(chosen, self._answer([waiting[n] for n in chosen], waiting), strict=True):
                resume(number, answer)

    def _answer(self, needs: Sequence[Need], waiting: dict[int, Need]) -> list[Any]:
        """The answer to each of these needs, which are of one kind."""
        if isinstance(needs[0], Score):
            sequences = [need.sequences for need in needs if isinstance(need, Score)]
            return _divided(self._score(_joined(sequences)), sequences)
        if isinstance(needs[0], Verify):
            items = [need.items for need in needs if isinstance(need, Verify)]
            return _divided(self._verify(_joined(items)), items)
        decodes = [need for need in needs if isinstance(need, Decode)]
        elsewhere = sum(need.place for need in waiting.values() if isinstance(need, Decode))
        elsewhere -= sum(need.place for need in decodes)
        return self._decode(decodes, elsewhere)

    def _score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]:
        self._progress.stage = "scoring"
        found = self._engine.score(sequences)
        if not all(np.isfinite(values).all() for pair in found for values in pair):
            raise NonFiniteLogitsError(
                "the model gives NaN or infinite logits for the records of this chunk: check the checkpoint, and its"
                " precision (--bf16, --fp16)"
            )
        return found

    def _verify(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Verification runs in processes of the leading rank, which shares the verdicts."""
        found: Any = None
        if self._leads:
            assert self._verifier is not None
            found = [(str(v.verdict), v.verified_by, v.extracted, v.reason) for v in self._verifier.verify(items)]
        return [Verdict(*verdict) for verdict in self._share(found)]

    def _decode(self, needs: Sequence[Decode], elsewhere: int) -> list[list[Completion]]:
        """Completions of each need. elsewhere: stages that turns which wait meanwhile have been through."""
        first, requests = needs[0], [request for need in needs for request in need.requests]
        progress = self._progress
        progress.enter(
            first.stage, first.place, len(needs), len(requests), first.settings.stopping.max_tokens, elsewhere
        )
        decoded = progress.count(self._engine.decode(requests, first.settings))
        completions = {completion.request.id: completion for completion in decoded}
        progress.stage = f"verifying {first.stage}"
        return [[completions[request.id] for request in need.requests] for need in needs]


def _choose(waiting: dict[int, Need]) -> list[int]:
    """The generators to be answered next, whose needs are of one kind."""
    for kind in (Score, Verify):
        if found := [number for number, need in waiting.items() if isinstance(need, kind)]:
            return sorted(found)
    decodes = {number: need for number, need in sorted(waiting.items()) if isinstance(need, Decode)}
    first = min(decodes.values(), key=lambda need: (need.turn, need.place))
    return [
        number
        for number, need in decodes.items()
        if (need.turn, need.place) == (first.turn, first.place) and need.settings == first.settings
    ]


def _joined[T](parts: Sequence[Sequence[T]]) -> list[T]:
    return [item for part in parts for item in part]


def _divided[T](values: Sequence[T], parts: Sequence[Sequence[Any]]) -> list[list[T]]:
    """`values`, in as many pieces as `parts`, and of their lengths."""
    rest = iter(values)
    return [[next(rest) for _ in part] for part in parts]

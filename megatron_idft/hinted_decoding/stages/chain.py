"""The stages of one assistant turn, in order, as a generator that asks for what it needs.

1. The original is scored. Own responses are sampled and verified, and the first right one is taken.
2. Where none is right, the model is shown the reference by the first template, with or without an analysis of its own,
   and hinted decoding mixes its distribution after that with its distribution without; the response is verified, too.
3. The same by the second template, and any after it.
4. The first hint again, closer to it, each time with another seed.
5. Where nothing was accepted, the original stays, or the record is dropped.

A stage that cannot run is left out, and the next one follows. Within a stage, a response that the length limit cut is
decoded once more with more room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import UserError
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import NO_MARKER, Stage
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.candidates import Candidate, Ids, cut_before, from_completion
from megatron_idft.hinted_decoding.stages.given import analysis_ids, check_given, read_rollouts
from megatron_idft.hinted_decoding.stages.judge import Judge
from megatron_idft.hinted_decoding.stages.marker import close_at_marker, without_stop
from megatron_idft.hinted_decoding.stages.needs import Decode, Steps, decode, score
from megatron_idft.hinted_decoding.stages.tasks import Hint, Turn
from megatron_idft.inference.requests import Completion, DecodeSettings, Request, Sampling, Stopping

_ROLLOUT = 0  # place in the chain
_TOO_LONG = "hinted prompt longer than --seq-length"


def longest_chain(settings: RealignSettings) -> int:
    """The number of batches that a turn goes through at most."""
    return max(_places(settings), default=_ROLLOUT) + 1 + settings.retries


def _places(settings: RealignSettings) -> list[int]:
    """The places in the chain of each template's response; its analysis comes one before."""
    places, last = [], _ROLLOUT
    for template in settings.templates:
        last += 1 + (template.marker is not None)
        places.append(last)
    return places


class Chain:
    """Takes turns through the stages; keeps nothing between them.

    Args:
        settings: of the job.
        tokenizer: of the model.
        judge: decides about candidates.
    """

    def __init__(self, settings: RealignSettings, tokenizer: ChatTokenizer, judge: Judge):
        self._settings, self._tokenizer, self._judge = settings, tokenizer, judge
        self._piece = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))

    def run(self, turn: Turn) -> Steps[None]:
        """All stages, until a candidate is accepted; then the turn's `stage` and `reason` are set."""
        settings = self._settings
        if not settings.regenerate:
            yield from self._score_original(turn)
        if turn.prompt.fixed:
            turn.stage = "original"
            return
        if self._judge.can_decide(turn) or settings.unverified == "keep":
            yield from self._roll_out(turn)
            yield from self._decode_hinted(turn)
        self._choose(turn)

    def _score_original(self, turn: Turn) -> Steps[None]:
        """A response that is longer than the context counts as far as that reaches."""
        limit = self._settings.max_positions + 1  # the last token is not fed
        sequence = np.concatenate([turn.prompt.ids, turn.prompt.original_ids])[:limit]
        [(log_prob, entropy)] = yield from score([sequence])
        first = len(turn.prompt.ids) - 1
        turn.original = log_prob[first:], entropy[first:]

    def _roll_out(self, turn: Turn) -> Steps[None]:
        settings = self._settings
        if turn.rollouts:
            made = yield from read_rollouts(turn.prompt, turn.rollouts, self._tokenizer, settings.max_positions)
            yield from self._judge.judge(turn, made)
            return
        samples = range(settings.rollout_samples) if turn.sample is None else [turn.sample]
        names = [f"{turn.name}/rollout/{i}" for i in samples]
        requests = [Request(name, turn.prompt.ids, seed=settings.seed) for name in names]
        batch = _Batch("own responses", _ROLLOUT, settings.rollout_sampling)
        yield from self._respond(turn, "rollout", requests, batch)

    def _decode_hinted(self, turn: Turn) -> Steps[None]:
        """The stages with a hint, up to the first accepted response."""
        settings = self._settings
        places = _places(settings)
        given: list[Ids] = []
        for i, template in enumerate(settings.templates):
            if turn.accepted is not None:
                return
            stage: Stage = "second_hint" if i else "hinted"
            name = f"{turn.name}/{stage}" + (f"/{i}" if i > 1 else "")
            hint = yield from self._hint(turn, template, Hint(stage, template.sha256), name, places[i] - 1)
            if hint.ids is not None:
                given.append(hint.ids)
                words = "responses by the second hint" if i else "hinted responses"
                request = Request(name, turn.prompt.ids, hint.ids, settings.seed)
                yield from self._mix(turn, stage, request, words, places[i], settings.mixing)
        for attempt in range(1, 1 + settings.retries):
            if turn.accepted is None and given:
                words = f"responses closer to the hint, try {attempt}"
                request = Request(f"{turn.name}/retry/{attempt}", turn.prompt.ids, given[0], settings.seed + attempt)
                mixing = settings.mixing.scaled(settings.retry_slope_factor**attempt)
                yield from self._mix(turn, "retry", request, words, places[-1] + attempt, mixing)

    def _mix(
        self, turn: Turn, stage: Stage, request: Request, words: str, place: int, mixing: EntropyMixing
    ) -> Steps[None]:
        """One hinted response."""
        batch = _Batch(words, place, self._settings.hinted_sampling, mixing)
        yield from self._respond(turn, stage, [request], batch)

    def _hint(self, turn: Turn, template: HintTemplate, hint: Hint, name: str, place: int) -> Steps[Hint]:
        """The hint with its prompt by this template, or why there is none. name: of its stage, for the draws."""
        turn.hints.append(hint)
        given = turn.analysis_for(template)
        try:
            text, ids = turn.ask_by(template, self._tokenizer)
            if given is not None:
                check_given("analyses", given, ids, self._tokenizer)
        except UserError as error:
            hint.failure = f"no hinted prompt: {error}"
            return hint
        if template.marker is not None:
            if given is not None:
                written = analysis_ids(given, text, self._tokenizer)
                hint.analysis = without_stop(written, turn.prompt.end_ids, self._stop_ids(turn))
            elif len(ids) < self._settings.max_positions:
                yield from self._analyse(turn, hint, ids, name, place)
            if hint.analysis is not None:
                ids = np.concatenate([ids, self._closed(hint, template, hint.analysis)]).astype(np.int32)
        if hint.failure is None and len(ids) >= self._settings.max_positions:
            hint.failure = _TOO_LONG
        if hint.failure is None:
            hint.ids = ids
        return hint

    def _analyse(self, turn: Turn, hint: Hint, asked: Ids, name: str, place: int) -> Steps[None]:
        """What the model writes about the reference."""
        settings = self._settings
        name = f"{turn.name}/analysis" if hint.stage == "hinted" else f"{name}/analysis"
        request = Request(name, asked, seed=settings.seed)
        batch = _Batch("analyses of the references", place, settings.analysis_sampling)
        [done] = yield from self._decode(turn, [request], batch, settings.analysis_max_tokens)
        hint.analysis_tokens = len(done.token_ids)
        hint.analysis = without_stop(done.token_ids, turn.prompt.end_ids, self._stop_ids(turn))

    def _closed(self, hint: Hint, template: HintTemplate, analysis: Ids) -> Ids:
        """The analysis through its marker, which is ours to write unless the model has to."""
        closed, hint.marker = close_at_marker(analysis, template, self._tokenizer, self._settings.analysis_marker)
        if closed is None:
            hint.failure = NO_MARKER
            return analysis
        return closed

    def _respond(self, turn: Turn, stage: Stage, requests: Sequence[Request], batch: _Batch) -> Steps[None]:
        """Responses, judged; where none is accepted, those that the length limit cut are decoded with more room."""
        settings, longest = self._settings, self._settings.max_tokens
        done = yield from self._decode(turn, requests, batch, longest)
        made = [self._candidate(turn, completion, stage, batch) for completion in done]
        yield from self._judge.judge(turn, made)
        cut = [i for i, completion in enumerate(done) if completion.finish_reason == "length"]
        if turn.accepted is not None or not cut or settings.more_room <= 1:
            return
        # The same draws write the same beginning.
        wider = replace(batch, words=f"{batch.words} with more room")
        more = math.ceil(settings.more_room * longest)
        done = yield from self._decode(turn, [requests[i] for i in cut], wider, more, must_fit=longest)
        shorter = {id(made[i]) for i in cut}
        turn.candidates = [candidate for candidate in turn.candidates if id(candidate) not in shorter]
        longer = [self._candidate(turn, completion, stage, batch) for completion in done]
        for candidate in longer:
            candidate.more_room = True
        yield from self._judge.judge(turn, longer)

    def _candidate(self, turn: Turn, completion: Completion, stage: Stage, batch: _Batch) -> Candidate:
        tokenizer, mixing = self._tokenizer, batch.mixing
        prompt = turn.prompt
        if prompt.calls_begin:
            completion = cut_before(completion, prompt.calls_begin, prompt.end_ids, tokenizer.decode)
        candidate = from_completion(completion, stage, prompt.end_ids, tokenizer.eos_id, tokenizer.decode)
        candidate.finished = candidate.finished and prompt.ends_its_thought(candidate.text)
        candidate.slope = mixing.slope if mixing is not None and mixing.has_slope else None
        return candidate

    def _decode(
        self,
        turn: Turn,
        requests: Sequence[Request],
        batch: _Batch,
        max_tokens: int,
        *,
        must_fit: int | None = None,
    ) -> Steps[list[Completion]]:
        settings, mixing = self._settings, batch.mixing
        stopping = Stopping(
            stop_ids=self._stop_ids(turn),
            max_tokens=max_tokens,
            must_fit=must_fit,
            stop_on_first_token=mixing is None or settings.stop_on_first_token,
            repetition=settings.repetition,
            splitter=settings.splitter if mixing is not None else None,
            piece=self._piece,
        )
        decoding = DecodeSettings(batch.sampling, stopping, mixing)
        return (yield from decode(Decode(requests, decoding, batch.words, turn.number, batch.place)))

    def _stop_ids(self, turn: Turn) -> frozenset[int]:
        return frozenset({int(turn.prompt.end_ids[-1]), self._tokenizer.eos_id})

    def _choose(self, turn: Turn) -> None:
        """The stage that a turn ends with, and why no candidate was accepted where none was."""
        self._judge.accept_unknown(turn)
        accepted = turn.accepted
        if accepted is not None:
            turn.stage = accepted.stage
            return
        settings, reasons = self._settings, {candidate.rejected_because for candidate in turn.candidates}
        if not self._judge.can_decide(turn) and settings.unverified != "keep":
            turn.reason = "no reference answer to verify with"
        else:
            turn.reason = turn.rejections[-1][1] if turn.rejections else "no stage was run"
        cannot_tell = not self._judge.can_decide(turn) or ("unverified" in reasons and "wrong" not in reasons)
        policy = settings.unverified if cannot_tell else "keep"
        if policy == "keep":
            policy = settings.fallback
        elif policy == "drop" and turn.reference is None and turn.prompt.calls_begin:
            policy = "original"  # a text beside tool calls: the calls are what the record is about
        if policy == "original":
            turn.stage, turn.weight = "original", settings.original_weight


@dataclass(frozen=True, slots=True)
class _Batch:
    """What responses of one kind are decoded with, and what they are called for who watches."""

    words: str
    place: int
    sampling: Sampling
    mixing: EntropyMixing | None = None

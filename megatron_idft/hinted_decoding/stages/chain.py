"""The stages of one assistant turn, in order, as a generator that asks for what it needs.

The original is scored; own responses are sampled and verified, and the first right one is taken. Where none is right,
the model analyses the reference, and hinted decoding mixes its distribution after that analysis with its distribution
without; that response is verified in turn. Where nothing is accepted, the fallback decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import UserError
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import Stage
from megatron_idft.hinted_decoding.prompts import HintTemplate, cut_at_marker
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.candidates import Candidate, Ids, from_completion
from megatron_idft.hinted_decoding.stages.conversation import encode
from megatron_idft.hinted_decoding.stages.given import analysis_ids, check_given, read_rollouts
from megatron_idft.hinted_decoding.stages.judge import Judge
from megatron_idft.hinted_decoding.stages.needs import Decode, Steps, decode, score
from megatron_idft.hinted_decoding.stages.tasks import Turn
from megatron_idft.inference.requests import Completion, DecodeSettings, Request, Sampling, Stopping, Tokens

_SHOWN_ANALYSIS = 2000  # characters of one without a marker
_ROLLOUT, _ANALYSIS = 0, 1  # places in the chain
_TOO_LONG = "hinted prompt longer than --seq-length"


def longest_chain(settings: RealignSettings) -> int:
    """The number of stages that a turn goes through at most."""
    retries = settings.retries if settings.fallback == "retry" else 0
    return _hinted_place(settings) + 1 + retries


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
        yield from self._score_original(turn)
        if turn.reference is not None or settings.unverified == "keep":
            yield from self._roll_out(turn)
            yield from self._hint(turn, settings.templates[0])
            yield from self._decode_hinted(turn, "hinted", attempt=0)
            for attempt in range(1, 1 + settings.retries if settings.fallback == "retry" else 1):
                yield from self._decode_hinted(turn, "retry", attempt)
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
        else:
            names = [f"{turn.name}/rollout/{i}" for i in range(settings.rollout_samples)]
            requests = [Request(name, turn.prompt.ids, seed=settings.seed) for name in names]
            done = yield from self._decode(
                turn, "own responses", _ROLLOUT, requests, settings.rollout_sampling, settings.max_tokens
            )
            made = [self._from_completion(turn, completion, "rollout") for completion in done]
        yield from self._judge.judge(turn, made)

    def _from_completion(self, turn: Turn, completion: Completion, stage: Stage) -> Candidate:
        tokenizer = self._tokenizer
        return from_completion(completion, stage, turn.prompt.end_ids, tokenizer.eos_id, tokenizer.decode)

    def _hint(self, turn: Turn, template: HintTemplate) -> Steps[None]:
        """The hinted prompt; where there is none, `not_hinted` says why."""
        if turn.accepted is not None:
            return
        try:
            messages = template.render(turn.history, turn.original_text, turn.answer)
            text = self._tokenizer.template.render(messages, add_generation_prompt=True)
            asked = encode(self._tokenizer, text)
            if turn.analysis is not None:
                check_given("analyses", turn.analysis, asked, self._tokenizer)
        except UserError as error:
            turn.not_hinted = f"no hinted prompt: {error}"
            return
        if template.marker is None:
            self._set_hinted_prompt(turn, asked)
        elif turn.analysis is not None:
            ids = analysis_ids(turn.analysis, text, self._tokenizer)
            self._set_hinted_prompt(turn, asked, self._cut_analysis(turn, template, ids))
        elif len(asked) >= self._settings.max_positions:
            turn.not_hinted = _TOO_LONG
        else:
            ids = yield from self._analyse(turn, asked)
            self._set_hinted_prompt(turn, asked, self._cut_analysis(turn, template, ids))

    def _analyse(self, turn: Turn, asked: Ids) -> Steps[Ids]:
        """What the model writes about the reference."""
        settings = self._settings
        request = Request(f"{turn.name}/analysis", asked, seed=settings.seed)
        stage, longest = "analyses of the references", settings.analysis_max_tokens
        [done] = yield from self._decode(turn, stage, _ANALYSIS, [request], settings.analysis_sampling, longest)
        turn.analysis_tokens = len(done.token_ids)
        return done.token_ids

    def _cut_analysis(self, turn: Turn, template: HintTemplate, ids: Ids) -> Ids | None:
        """The analysis through its marker; of one without, the head is kept for the report."""
        cut = cut_at_marker(ids, template, self._tokenizer)
        if cut is None:
            turn.failed_analysis = self._tokenizer.decode(ids)[:_SHOWN_ANALYSIS]
        return cut

    def _set_hinted_prompt(self, turn: Turn, *parts: Tokens | None) -> None:
        found = [part for part in parts if part is not None]
        ids = np.concatenate(found).astype(np.int32)
        if len(found) < len(parts):
            turn.not_hinted = "no marker in the analysis"
        elif len(ids) >= self._settings.max_positions:
            turn.not_hinted = _TOO_LONG
        else:
            turn.hinted_prompt = ids

    def _decode_hinted(self, turn: Turn, stage: Stage, attempt: int) -> Steps[None]:
        if turn.accepted is not None or turn.hinted_prompt is None:
            return
        settings = self._settings
        seed, mixing = settings.seed + attempt, settings.mixing.scaled(settings.retry_slope_factor**attempt)
        name = f"{turn.name}/{stage}" + (f"/{attempt}" if attempt else "")
        request = Request(name, turn.prompt.ids, turn.hinted_prompt, seed)
        shown = f"hinted responses, try {attempt + 1}" if attempt else "hinted responses"
        place = _hinted_place(settings) + attempt
        done = yield from self._decode(
            turn, shown, place, [request], settings.hinted_sampling, settings.max_tokens, mixing
        )
        made = [self._from_completion(turn, completion, stage) for completion in done]
        for candidate in made:
            candidate.slope = mixing.slope if mixing.has_slope else None
        yield from self._judge.judge(turn, made, hinted=True)

    def _decode(
        self,
        turn: Turn,
        stage: str,
        place: int,
        requests: Sequence[Request],
        sampling: Sampling,
        max_tokens: int,
        mixing: EntropyMixing | None = None,
    ) -> Steps[list[Completion]]:
        settings = self._settings
        stopping = Stopping(
            stop_ids=frozenset({int(turn.prompt.end_ids[-1]), self._tokenizer.eos_id}),
            max_tokens=max_tokens,
            stop_on_first_token=mixing is None or settings.stop_on_first_token,
            repetition=settings.repetition,
            splitter=settings.splitter if mixing is not None else None,
            piece=self._piece,
        )
        return (
            yield from decode(Decode(requests, DecodeSettings(sampling, stopping, mixing), stage, turn.number, place))
        )

    def _choose(self, turn: Turn) -> None:
        """The stage that a turn ends with, and why no candidate was accepted where none was."""
        self._judge.accept_unknown(turn)
        accepted = turn.accepted
        if accepted is not None:
            turn.stage = accepted.stage
            return
        reasons = {candidate.rejected_because for candidate in turn.candidates}
        if turn.reference is None and self._settings.unverified != "keep":
            turn.reason = "no reference answer to verify with"
        else:
            # The last word on it: a hint that could not be given comes after the rollouts.
            turn.reason = turn.not_hinted or next(
                (c.rejected_because for c in reversed(turn.candidates) if c.rejected_because), "no stage was run"
            )
        cannot_tell = turn.reference is None or ("unverified" in reasons and "wrong" not in reasons)
        policy = self._settings.unverified if cannot_tell else "keep"
        if policy == "keep":
            policy = self._settings.last_resort
        turn.stage = "original" if policy == "original" else None


def _hinted_place(settings: RealignSettings) -> int:
    return _ANALYSIS + (settings.templates[0].marker is not None)

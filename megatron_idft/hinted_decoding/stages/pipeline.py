"""The stages of a realignment, for some records at a time.

For each assistant turn, in order: the original is scored; own responses are sampled and verified, and the first right
one is taken. Where none is right, the model analyses the reference, and hinted decoding mixes its distribution after
that analysis with its distribution without; that response is verified in turn. Where nothing is accepted, the fallback
decides.

All tensor-parallel ranks run this with the same records and make the same calls of the engine. Verification runs in
processes of the leading rank, which shares the verdicts; all else is the same on every rank by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import NonFiniteLogitsError, UserError
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow, Stage
from megatron_idft.hinted_decoding.prompts import cut_at_marker
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.candidates import Candidate, Floats, Ids, from_completion, from_text
from megatron_idft.hinted_decoding.stages.conversation import encode, encode_after
from megatron_idft.hinted_decoding.stages.judge import Judge, Verifies
from megatron_idft.hinted_decoding.stages.progress import StageProgress
from megatron_idft.hinted_decoding.stages.tasks import RealignInput, RecordTask, Turn
from megatron_idft.inference.requests import Completion, DecodeSettings, Request, Sampling, Stopping, Tokens

_SHOWN_ANALYSIS = 2000  # characters of one without a marker


class Engine(Protocol):
    """The part of inference.engine.DecodeEngine that is needed here."""

    decoded_tokens: int

    def decode(self, requests: Sequence[Request], settings: DecodeSettings) -> Iterator[Completion]: ...

    def score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]: ...


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
    ):
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._judge = Judge(verifier, leaks, accept_unverified=settings.unverified == "keep", share=share, leads=leads)
        self._provenance = {**provenance, "prompt": settings.template.sha256}
        self._fingerprint = tokenizer.fingerprint()
        self.progress = StageProgress.of(settings, lambda: engine.decoded_tokens)
        self._piece = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))

    def realign(self, records: Sequence[RealignInput]) -> list[OutcomeRow]:
        """The outcomes of `records`, in their order; the error of a record stands in its row."""
        tasks = [RecordTask(given, self._tokenizer, self._settings.max_positions) for given in records]
        self.progress.begin(sum(task.num_turns for task in tasks))
        for number in range(max((task.num_turns for task in tasks), default=0)):
            begun = [(task, task.begin(number)) for task in tasks]
            turns = {turn.name: (task, turn) for task, turn in begun if turn is not None}
            self.progress.begin_turns(len(turns))
            self._run_stages([turn for _, turn in turns.values()])
            for task, turn in turns.values():
                task.settle(turn)
        self.progress.begin(0)
        return [task.row(self._provenance, self._fingerprint) for task in tasks]

    def _run_stages(self, turns: list[Turn]) -> None:
        settings = self._settings
        self.progress.stage = "scoring the originals"
        self._score_originals(turns)
        tried = [turn for turn in turns if turn.reference is not None or settings.unverified == "keep"]
        self._roll_out(tried)
        missed = [turn for turn in tried if turn.accepted is None]
        self.progress.settle(len(turns) - len(missed))
        self._hint(missed)
        self._decode_hinted(missed, "hinted", attempt=0)
        for attempt in range(1, 1 + settings.retries if settings.fallback == "retry" else 1):
            self._decode_hinted(missed, "retry", attempt)
        for turn in turns:
            self._choose(turn)
        self.progress.settle(len(missed))

    def _score_originals(self, turns: Sequence[Turn]) -> None:
        """A response that is longer than the context counts as far as that reaches."""
        limit = self._settings.max_positions + 1  # the last token is not fed
        sequences = [np.concatenate([turn.prompt.ids, turn.prompt.original_ids])[:limit] for turn in turns]
        for turn, (log_prob, entropy) in zip(turns, self._scored(sequences), strict=True):
            first = len(turn.prompt.ids) - 1
            turn.original = log_prob[first:], entropy[first:]

    def _scored(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]:
        found = self._engine.score(sequences) if sequences else []
        if not all(np.isfinite(values).all() for pair in found for values in pair):
            raise NonFiniteLogitsError(
                "the model gives NaN or infinite logits for the records of this chunk: check the checkpoint, and its"
                " precision (--bf16, --fp16)"
            )
        return found

    def _roll_out(self, turns: Sequence[Turn]) -> None:
        settings = self._settings
        requests = {
            f"{turn.name}/rollout/{i}": (turn, Request(f"{turn.name}/rollout/{i}", turn.prompt.ids, seed=settings.seed))
            for turn in turns
            if not turn.rollouts
            for i in range(settings.rollout_samples)
        }
        done = self._decode("own responses", requests, settings.rollout_sampling, settings.max_tokens)
        made = [(turn, self._from_completion(turn, done[name], "rollout")) for name, (turn, _) in requests.items()]
        self._judge(made + self._read_rollouts([turn for turn in turns if turn.rollouts]))

    def _read_rollouts(self, turns: Sequence[Turn]) -> list[tuple[Turn, Candidate]]:
        """Responses that another engine wrote, scored here."""
        written: list[tuple[Turn, str, Ids, bool]] = []
        for turn in turns:
            room = self._settings.max_positions - len(turn.prompt.ids)
            for text in turn.rollouts:
                ids = encode_after(self._tokenizer, turn.prompt.text, text + turn.prompt.end)
                written.append((turn, text, ids[:room], len(ids) <= room))
        scored = self._scored([np.concatenate([turn.prompt.ids, ids]) for turn, _, ids, _ in written])
        return [
            (turn, from_text(text, ids, fits, *(values[len(turn.prompt.ids) - 1 :] for values in statistics)))
            for (turn, text, ids, fits), statistics in zip(written, scored, strict=True)
        ]

    def _from_completion(self, turn: Turn, completion: Completion, stage: Stage) -> Candidate:
        tokenizer = self._tokenizer
        return from_completion(completion, stage, turn.prompt.end_ids, tokenizer.eos_id, tokenizer.decode)

    def _hint(self, turns: Sequence[Turn]) -> None:
        """Hinted prompts; for a turn that gets none, `not_hinted` says why."""
        settings, template = self._settings, self._settings.template
        prompts: dict[str, tuple[Turn, str]] = {}
        for turn in turns:
            try:
                messages = template.render(turn.history, turn.original_text, turn.answer)
                text = self._tokenizer.template.render(messages, add_generation_prompt=True)
            except UserError as error:
                turn.not_hinted = f"no hinted prompt: {error}"
                continue
            prompts[f"{turn.name}/analysis"] = turn, text
        if template.marker is None:
            for turn, text in prompts.values():
                self._set_hinted_prompt(turn, encode(self._tokenizer, text))
            return
        requests: dict[str, tuple[Turn, Request]] = {}
        asked = {name: encode(self._tokenizer, text) for name, (_, text) in prompts.items()}
        for name, (turn, text) in prompts.items():
            if turn.analysis is not None:
                ids = encode_after(self._tokenizer, text, turn.analysis)
                self._set_hinted_prompt(turn, asked[name], self._cut_analysis(turn, ids))
            elif len(asked[name]) >= settings.max_positions:
                turn.not_hinted = "hinted prompt longer than --seq-length"
            else:
                requests[name] = turn, Request(name, asked[name], seed=settings.seed)
        done = self._decode(
            "analyses of the references", requests, settings.analysis_sampling, settings.analysis_max_tokens
        )
        for name, (turn, request) in requests.items():
            ids = done[name].token_ids
            turn.analysis_tokens = len(ids)
            self._set_hinted_prompt(turn, request.prompt, self._cut_analysis(turn, ids))

    def _cut_analysis(self, turn: Turn, ids: Ids) -> Ids | None:
        """The analysis through its marker; of one without, the head is kept for the report."""
        cut = cut_at_marker(ids, self._settings.template, self._tokenizer)
        if cut is None:
            turn.failed_analysis = self._tokenizer.decode(ids)[:_SHOWN_ANALYSIS]
        return cut

    def _set_hinted_prompt(self, turn: Turn, *parts: Tokens | None) -> None:
        found = [part for part in parts if part is not None]
        ids = np.concatenate(found).astype(np.int32)
        if len(found) < len(parts):
            turn.not_hinted = "no marker in the analysis"
        elif len(ids) >= self._settings.max_positions:
            turn.not_hinted = "hinted prompt longer than --seq-length"
        else:
            turn.hinted_prompt = ids

    def _decode_hinted(self, turns: Sequence[Turn], stage: Stage, attempt: int) -> None:
        settings = self._settings
        seed, mixing = settings.seed + attempt, settings.mixing.scaled(settings.retry_slope_factor**attempt)
        requests: dict[str, tuple[Turn, Request]] = {}
        for turn in turns:
            if turn.accepted is None and turn.hinted_prompt is not None:
                name = f"{turn.name}/{stage}" + (f"/{attempt}" if attempt else "")
                requests[name] = turn, Request(name, turn.prompt.ids, turn.hinted_prompt, seed)
        name = f"hinted responses, try {attempt + 1}" if attempt else "hinted responses"
        done = self._decode(name, requests, settings.hinted_sampling, settings.max_tokens, mixing)
        made = [(turn, self._from_completion(turn, done[name], stage)) for name, (turn, _) in requests.items()]
        for _, candidate in made:
            candidate.slope = mixing.slope if mixing.has_slope else None
        self._judge(made, hinted=True)

    def _decode(
        self,
        stage: str,
        requests: Mapping[str, tuple[Turn, Request]],
        sampling: Sampling,
        max_tokens: int,
        mixing: EntropyMixing | None = None,
    ) -> dict[str, Completion]:
        """Completions by the requests' ids. stage: its name, for who watches."""
        self.progress.enter(stage, len(requests), max_tokens)
        if not requests:
            return {}
        settings = self._settings
        ends = {int(turn.prompt.end_ids[-1]) for turn, _ in requests.values()}
        stopping = Stopping(
            stop_ids=ends | {self._tokenizer.eos_id},
            max_tokens=max_tokens,
            stop_on_first_token=mixing is None or settings.stop_on_first_token,
            repetition=settings.repetition,
            splitter=settings.splitter if mixing is not None else None,
            piece=self._piece,
        )
        decoded = self._engine.decode(
            [request for _, request in requests.values()],
            DecodeSettings(sampling, stopping, mixing),
        )
        completions = {completion.request.id: completion for completion in self.progress.count(decoded)}
        self.progress.stage = f"verifying {stage}"
        return completions

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

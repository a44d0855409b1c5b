"""A record on its way through the stages, turn by turn, and the row that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import InputError, UserError
from megatron_idft.hinted_decoding.input.provided import ProvidedText
from megatron_idft.hinted_decoding.output.outcomes import (
    FailureRow,
    HintRow,
    MarkerOrigin,
    OutcomeRow,
    Stage,
    TurnRow,
    TurnStage,
)
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.stages.candidates import Candidate, Ids, Provenance, response_sums
from megatron_idft.hinted_decoding.stages.conversation import RunningConversation, TurnPrompt, encode
from megatron_idft.hinted_decoding.stages.given import check_given

_CHAIN: tuple[Stage, ...] = get_args(Stage)  # in the order in which they are tried
_OPEN_TURN = "…"  # stands for an answer that is not there yet
_NONE, _NO_IDS = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class RealignInput:
    """A record and the texts of other engines for it, by assistant turn; turn None: the record has only one.

    Attributes:
        index: of the outcome.
        sample: which of several responses to the record is asked for; None: the one that is accepted.
        samples: how many responses there are.
    """

    index: int
    record: Record
    rollouts: Mapping[int | None, Sequence[ProvidedText]] = field(default_factory=dict)
    analyses: Mapping[int | None, ProvidedText] = field(default_factory=dict)
    sample: int | None = None
    samples: int = 1


@dataclass(slots=True)
class Hint:
    """What the hinted stream is shown at one stage.

    Attributes:
        prompt: sha256 of the template.
        ids: int32 [n], the hinted prompt; None: there is none, and `failure` says why.
        analysis: token ids without a stop token, of the model or of a file.
        analysis_tokens: as many as the model wrote.
        marker: who wrote it.
    """

    stage: Stage
    prompt: str
    ids: Ids | None = None
    analysis: Ids | None = None
    analysis_tokens: int | None = None
    marker: MarkerOrigin | None = None
    failure: str | None = None

    def row(self, decode: Callable[[Ids], str], with_text: bool) -> HintRow:
        """As it is written."""
        return {
            "stage": self.stage,
            "prompt": self.prompt,
            "num_prompt_tokens": None if self.ids is None else len(self.ids),
            "analysis_tokens": self.analysis_tokens,
            "analysis_text": decode(self.analysis) if with_text and self.analysis is not None else None,
            "marker": self.marker,
            "failure": self.failure,
        }


@dataclass(slots=True)
class Turn:
    """One assistant turn.

    Attributes:
        number: among the assistant's turns, from 0.
        history: the messages before the turn.
        reasoning: of the original, where the response is to have some; else empty.
        reference: the answer that verification compares with.
        rollouts, analysis: of other engines.
        sample: the number of the only own response, which names its draws; None: as many as the settings say.
        original: log_prob and entropy of the original response, fp32 [n] each.
        hints: of the stages that were to be hinted, in order.
        stage: "original" or that of the accepted candidate; None: not settled yet, or dropped.
        weight: of an original in the loss.
    """

    record: Record
    number: int
    prompt: TurnPrompt
    history: list[dict[str, Any]]
    original_text: str
    reasoning: str
    reference: Any
    rollouts: Sequence[ProvidedText]
    analysis: ProvidedText | None
    sample: int | None = None
    original: tuple[NDArray[np.float32], NDArray[np.float32]] = (_NONE, _NONE)  # log_prob, entropy
    candidates: list[Candidate] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    stage: TurnStage | None = None
    weight: float = 1.0
    reason: str | None = None

    @property
    def name(self) -> str:
        """Names the random draws of this turn, which depend on no other turn of the batch."""
        return f"{self.record.id}/{self.number}"

    @property
    def accepted(self) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.accepted), None)

    @property
    def failures(self) -> list[FailureRow]:
        """Why each stage gave no text, in order; nothing where one did."""
        if self.accepted is not None:
            return []
        found: dict[Stage, dict[str, None]] = {}  # a dict for a set in order
        for stage, reason in self.rejections:
            found.setdefault(stage, {})[reason] = None
        return [{"stage": stage, "reason": ", ".join(reasons)} for stage, reasons in found.items()]

    @property
    def rejections(self) -> list[tuple[Stage, str]]:
        """Why candidates were rejected and hints not given, with their stages, in the order of these."""
        found: list[tuple[Stage, str]] = [
            (candidate.stage, candidate.rejection) for candidate in self.candidates if candidate.rejection is not None
        ]
        found += [(hint.stage, hint.failure) for hint in self.hints if hint.failure is not None]
        return sorted(found, key=lambda rejection: _CHAIN.index(rejection[0]))

    @property
    def answer(self) -> str | None:
        """The reference as text for the hint."""
        if self.reference is None or isinstance(self.reference, str):
            return self.reference
        return json.dumps(self.reference, ensure_ascii=False, default=str)

    def ask_by(self, template: HintTemplate, tokenizer: ChatTokenizer) -> tuple[str, Ids]:
        """The prompt that shows the reference: that of the analysis or, without a marker, of the hinted stream.

        Returns:
            text, and int32 [n].

        Raises:
            InputError, TemplateError: one of the templates fails on this turn.
        """
        messages = template.render(self.history, self.solution, self.answer)
        text = tokenizer.template.render(messages, add_generation_prompt=True, tools=self.record.tools)
        return text, encode(tokenizer, text)

    def analysis_for(self, template: HintTemplate) -> ProvidedText | None:
        """The given analysis, where it belongs to this template."""
        given = self.analysis
        if given is None or template.marker is None or given.template_sha256 not in (None, template.sha256):
            return None
        return given

    @property
    def solution(self) -> str:
        """The original as the hint shows it."""
        return f"{self.reasoning.strip()}\n\n{self.original_text}" if self.reasoning else self.original_text

    @property
    def question(self) -> str:
        return "\n".join(str(message["content"]) for message in self.history)

    def provenance(self) -> Provenance | dict[str, Any]:
        """Where its text comes from, for `realigned` of the record."""
        if self.accepted is not None:
            return self.accepted.provenance()
        return {"stage": self.stage} | ({} if self.weight == 1 else {"weight": self.weight})

    def row(self, decode: Callable[[Ids], str], rejected_texts: bool) -> TurnRow:
        """As it is written, with the texts of analyses and rejected candidates or without."""
        original, candidate = response_sums(*self.original), self.accepted
        ids = _NO_IDS if candidate is None else candidate.token_ids
        return {
            "message": self.prompt.message,
            "stage": self.stage,
            "reason": self.reason,
            "num_prompt_tokens": len(self.prompt.ids),
            "original_text": self.original_text,
            "original_num_tokens": original["num_tokens"],
            "original_log_prob_sum": original["log_prob_sum"],
            "original_entropy_sum": original["entropy_sum"],
            "original_phi_sum": original["phi_sum"],
            "original_phi_squared_sum": original["phi_squared_sum"],
            "original_phi_below_1": original["phi_below_1"],
            "original_phi_below_3": original["phi_below_3"],
            "original_phi_below_5": original["phi_below_5"],
            "hints": [hint.row(decode, rejected_texts) for hint in self.hints],
            "candidates": [candidate.row(rejected_texts) for candidate in self.candidates],
            "failures": self.failures,
            "token_ids": ids,
            "tokens": [decode(ids[i : i + 1]) for i in range(len(ids))],
            "hint_share": _NONE if candidate is None else candidate.hint_share,
            "phi": _NONE if candidate is None else candidate.phi,
            "entropy": _NONE if candidate is None else candidate.entropy,
            "hinted_entropy": _NONE if candidate is None else candidate.hinted_entropy,
        }


class RecordTask:
    """One record: its conversation, its turns so far, and whether it is still in progress.

    Args:
        given: the record.
        tokenizer: of the model.
        max_positions: the context in tokens.
        open_end: a last message that is not the assistant's is answered, too.
        compared: responses are compared with references.
    """

    def __init__(
        self,
        given: RealignInput,
        tokenizer: ChatTokenizer,
        max_positions: int,
        *,
        open_end: bool = False,
        compared: bool = True,
    ):
        self.given, self.record = given, given.record
        self._tokenizer, self._max_positions, self._compared = tokenizer, max_positions, compared
        self._open_end = open_end and given.record.messages[-1]["role"] != "assistant"
        self.turns: list[Turn] = []
        self.error: str | None = None
        self.dropped: str | None = None
        self._conversation = self._guarded(self._open)
        if self._conversation is not None:
            self._guarded(self._check_given)

    @property
    def in_progress(self) -> bool:
        return self.error is None and self.dropped is None and self._conversation is not None

    @property
    def num_turns(self) -> int:
        return 0 if self._conversation is None else len(self._conversation.turns)

    def begin(self, number: int) -> Turn | None:
        """Turn number `number`; None where the record has no such turn or was given up."""
        if not self.in_progress or number >= self.num_turns:
            return None
        return self._guarded(lambda: self._begin(number))

    def settle(self, turn: Turn) -> None:
        """Go on after a turn for which a stage was chosen, or give the record up where there is none."""
        conversation, candidate = self._conversation, turn.accepted
        assert conversation is not None
        if turn.stage is None:
            self.dropped = turn.reason
        elif candidate is None:
            conversation.accept(turn.prompt.original_ids, None, turn.weight * turn.prompt.weight)
        else:
            conversation.accept(candidate.response_ids, candidate.text, turn.prompt.weight)

    def fail(self, reason: str) -> None:
        self.error = reason

    def row(self, provenance: Mapping[str, Any], fingerprint: str, *, rejected_texts: bool = True) -> OutcomeRow:
        """As it is written.

        Args:
            provenance: of the job.
            fingerprint: of tokenizer and chat template.
            rejected_texts: with the texts of analyses and rejected candidates.
        """
        record, conversation = self.record, self._conversation
        kept = self.in_progress
        row: OutcomeRow = {
            "index": self.given.index,
            "id": self._id,
            "file": record.file,
            "line": record.line,
            "source": record.source,
            "status": "kept" if kept else "error" if self.error is not None else "dropped",
            "reason": self.error if self.error is not None else self.dropped,
            "record": None,
            "token_ids": None,
            "loss_mask": None,
            "turns": [turn.row(self._tokenizer.decode, rejected_texts) for turn in self.turns],
        }
        if not kept or conversation is None:
            return row
        written: dict[str, Any] = {"messages": conversation.messages, "id": self._id}
        written |= {} if record.answer is None else {"answer": record.answer}
        written |= {} if record.source is None else {"source": record.source}
        written |= record.extra
        if any(turn.accepted is not None for turn in self.turns):
            row["token_ids"], row["loss_mask"] = conversation.ids, conversation.mask
            weights = [int(weight) if weight in (0, 1) else weight for weight in conversation.mask.tolist()]
            written["token_ids"], written["loss_mask"] = conversation.ids.tolist(), weights
            written["tokenizer_fingerprint"] = fingerprint
        several = {} if self.given.samples == 1 else {"record": record.id, "sample": self.given.sample}
        written["realigned"] = {**provenance, **several, "turns": [turn.provenance() for turn in self.turns]}
        row["record"] = json.dumps(written, ensure_ascii=False)
        return row

    def _open(self) -> RunningConversation:
        open_turn = [{"role": "assistant", "content": _OPEN_TURN}] if self._open_end else []
        return RunningConversation(self._tokenizer, [*self.record.messages, *open_turn], self.record.tools)

    @property
    def _id(self) -> str:
        """Of the outcome: the record's, and the sample where there are several."""
        return self.record.id if self.given.samples == 1 else f"{self.record.id}#{self.given.sample}"

    def _begin(self, number: int) -> Turn:
        assert self._conversation is not None
        prompt = self._conversation.begin(number)
        if len(prompt.ids) >= self._max_positions and not prompt.fixed:
            raise InputError(
                f"messages[{prompt.message}]: its prompt of {len(prompt.ids)} tokens leaves no room for a response in a"
                f" context of {self._max_positions}: shorten it, or raise --seq-length"
            )
        open_turn = prompt.message == len(self.record.messages)
        message = {} if open_turn else self.record.messages[prompt.message]
        text = str(message.get("content", ""))
        reference = final_answer(text)
        if number == self.num_turns - 1 and self.record.answer not in (None, ""):
            reference = self.record.answer
        rollouts, analyses = self.given.rollouts, self.given.analyses
        turn = Turn(
            record=self.record,
            number=number,
            prompt=prompt,
            history=self._conversation.messages[: prompt.message],
            original_text=text,
            reasoning=str(message.get("reasoning_content", "")) if prompt.thought_ends else "",
            reference=reference if self._compared else None,
            rollouts=rollouts.get(number) or rollouts.get(None) or (),
            analysis=analyses.get(number, analyses.get(None)),
            sample=self.given.sample,
        )
        for given in turn.rollouts:
            check_given("rollouts", given, prompt.ids, self._tokenizer)
        self.turns.append(turn)
        return turn

    def _check_given(self) -> None:
        for kind, given in (("rollouts", self.given.rollouts), ("analyses", self.given.analyses)):
            for turn in given:
                if turn is None and self.num_turns > 1:
                    raise InputError(
                        f"--{kind} names no turn for this record, which has {self.num_turns} turns of the assistant:"
                        ' add "turn", counted from 0'
                    )
                if turn is not None and not 0 <= turn < self.num_turns:
                    raise InputError(
                        f"--{kind} has turn {turn} of this record, whose turns are 0 to {self.num_turns - 1}"
                    )

    def _guarded[T](self, work: Callable[[], T]) -> T | None:
        """`work()`, or None where the record is at fault, which is then noted: one record stops no other."""
        try:
            return work()
        except UserError as error:
            self.error = str(error)
            return None

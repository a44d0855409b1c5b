"""The rows of a realignment: an outcome for each record, with every assistant turn and every try at it.

Each column is declared once: its Python type, which mypy follows from the stages to the report, and its Arrow type,
which the parts are written with. A row that an earlier version wrote may lack columns.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, TypedDict, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_idft.corpus.scores.display import bounded

Stage = Literal["rollout", "hinted", "second_hint", "retry"]
TurnStage = Literal["rollout", "hinted", "second_hint", "retry", "original"]
MarkerOrigin = Literal["model", "appended"]
Rejection = Literal["wrong", "unverified", "unfinished", "leak", "bare"]
Status = Literal["kept", "dropped", "error"]

Text = Annotated[str | None, pa.string()]
Count = Annotated[int, pa.int32()]
Share = Annotated[float | None, pa.float32()]
Sum = Annotated[float, pa.float64()]
Integers = Annotated[Sequence[int] | NDArray[np.int32], pa.list_(pa.int32())]
Floats = Annotated[Sequence[float] | NDArray[np.float32], pa.list_(pa.float32())]


def _fields(row: type) -> list[tuple[str, pa.DataType]]:
    return [(name, hint.__metadata__[0]) for name, hint in get_type_hints(row, include_extras=True).items()]


class ResponseSums(TypedDict):
    """Sums over the tokens of a response under the plain prompt, in nats at temperature 1; below: numbers of tokens."""

    num_tokens: Count
    log_prob_sum: Sum
    entropy_sum: Sum
    phi_sum: Sum
    phi_squared_sum: Sum
    phi_below_1: Count
    phi_below_3: Count
    phi_below_5: Count


class _Try(TypedDict):
    stage: Annotated[Stage, pa.string()]
    seed: Annotated[int | None, pa.int64()]
    slope: Annotated[float | None, pa.float64()]  # of the mixing; null for rollouts
    accepted: Annotated[bool, pa.bool_()]  # it went into the output
    rejected_because: Annotated[Rejection | None, pa.string()]
    verdict: Text  # right | wrong | unknown; null where nothing could be compared
    verified_by: Text  # exact | number | number, last in text | math-verify | module:function | model
    undecided_because: Text  # why the verdict is unknown
    model_probability: Share  # of Yes, where the model was asked whether the text is right; else null
    extracted: Text  # the final answer found in the text
    leak: Text  # the phrase that betrays the hint
    finish_reason: Annotated[str, pa.string()]  # eos | length | context | repetition
    text: Text  # null where rejected texts are left out
    more_room: Annotated[bool | None, pa.bool_()]  # decoded again, and further, since the length limit had cut it
    split_at: Annotated[int | None, pa.int32()]  # tokens before the hinted stream was dropped; null: never
    hint_share_mean: Share  # over the tokens drawn from two streams; null for rollouts
    hint_share_min: Share


class CandidateRow(_Try, ResponseSums):
    """One try at a turn."""


class FailureRow(TypedDict):
    """Why a stage that was run, or was to be run, gave a turn no text."""

    stage: Annotated[Stage, pa.string()]
    reason: Annotated[str, pa.string()]  # of its candidates' rejections, each once; or why there was none


class HintRow(TypedDict):
    """What the hinted stream was to see at one stage."""

    stage: Annotated[Stage, pa.string()]
    prompt: Annotated[str, pa.string()]  # sha256 of the template
    num_prompt_tokens: Annotated[int | None, pa.int32()]  # null where there is none
    analysis_tokens: Annotated[int | None, pa.int32()]  # written by the model; null: none, or read from a file
    analysis_text: Text  # null where there is none, or texts are left out
    marker: Annotated[MarkerOrigin | None, pa.string()]  # who wrote it; null: nobody
    failure: Text  # why there is no hinted prompt; null where there is one


CANDIDATE, FAILURE, HINT = (pa.struct(_fields(row)) for row in (CandidateRow, FailureRow, HintRow))


class TurnRow(TypedDict):
    """One assistant turn of the record."""

    message: Count  # its index in `messages`
    stage: Annotated[TurnStage | None, pa.string()]  # null where the record was dropped here
    reason: Text  # why no candidate was accepted, by the last stage; null where one was
    num_prompt_tokens: Count
    original_text: Annotated[str, pa.string()]
    # The original response under the plain prompt.
    original_num_tokens: Count
    original_log_prob_sum: Sum
    original_entropy_sum: Sum
    original_phi_sum: Sum
    original_phi_squared_sum: Sum
    original_phi_below_1: Count
    original_phi_below_3: Count
    original_phi_below_5: Count
    hints: Annotated[list[HintRow], pa.list_(HINT)]
    candidates: Annotated[list[CandidateRow], pa.list_(CANDIDATE)]
    failures: Annotated[list[FailureRow], pa.list_(FAILURE)]  # by stage, in order; empty where one was accepted
    # Of the accepted candidate, per token; empty where the turn is the original.
    token_ids: Integers
    tokens: Annotated[Sequence[str], pa.list_(pa.string())]
    hint_share: Floats  # 0 where only the plain stream ran
    phi: Floats
    entropy: Floats  # of the plain stream
    hinted_entropy: Floats  # NaN without a hinted stream


TURN = pa.struct(_fields(TurnRow))


class OutcomeRow(TypedDict):
    """The outcome of a record."""

    index: Annotated[int, pa.int64()]  # of the record in the input
    id: Annotated[str, pa.string()]
    file: Annotated[str, pa.string()]
    line: Annotated[int, pa.int64()]
    source: Text
    status: Annotated[Status, pa.string()]
    reason: Text  # why it was not kept
    record: Text  # the record to write, as JSON; null unless kept
    token_ids: Annotated[NDArray[np.int32] | None, pa.list_(pa.int32())]  # of all; null where a template is to write it
    loss_mask: Annotated[NDArray[np.float64] | None, pa.list_(pa.float32())]  # 1, or a weight
    turns: Annotated[list[TurnRow], pa.list_(TURN)]


OUTCOME_SCHEMA = pa.schema(_fields(OutcomeRow))

STAGE_NAMES = {  # for a person
    "rollout": "own response",
    "hinted": "hinted",
    "second_hint": "second hint",
    "retry": "retry",
}
NO_MARKER = "no marker in the analysis"  # a hint's failure
UNVERIFIED, ORIGINAL, BY_MODEL = "UNVERIFIED", "original", "model"
_TURNS = "turns.list.element"
_CANDIDATES = f"{_TURNS}.candidates.list.element"
FAILURE_COLUMNS = [f"{_TURNS}.failures.list.element.{name}" for name in ("stage", "reason")]
METHOD_COLUMNS = [f"{_TURNS}.stage"] + [f"{_CANDIDATES}.{name}" for name in ("accepted", "verdict", "verified_by")]

_HINTS = f"{_TURNS}.hints.list.element"
TRY_COLUMNS = [f"{_CANDIDATES}.more_room", f"{_CANDIDATES}.finish_reason", f"{_HINTS}.marker"]


def describe_reason(row: OutcomeRow) -> str | None:
    """Why a record was not kept: the failure of each stage at the turn that it was given up for, else its reason.

    Folders written before there were `failures` have only the last stage's reason.
    """
    turns = row.get("turns") or ()
    failures = (turns[-1].get("failures") or ()) if turns and row["status"] == "dropped" else ()
    by_stage = [f"{STAGE_NAMES.get(failure['stage'], failure['stage'])}: {failure['reason']}" for failure in failures]
    return "; ".join(by_stage) or row.get("reason")


def count_methods(turns: Iterable[TurnRow]) -> Counter[str]:
    """Kept turns by the rule that found their text right, `verified_by`, or as UNVERIFIED or ORIGINAL."""
    return Counter(map(_method, turns))


def _method(turn: TurnRow) -> str:
    accepted = next((candidate for candidate in turn["candidates"] or () if candidate["accepted"]), None)
    if accepted is None:
        return ORIGINAL
    return accepted["verified_by"] if accepted["verdict"] == "right" and accepted["verified_by"] else UNVERIFIED


def count_tries(turns: Iterable[TurnRow]) -> Counter[str]:
    """Analyses by who wrote their marker, "model" or "appended"; responses decoded with "more room", and "finished"."""
    counts = Counter[str]()
    for turn in turns:
        for hint in turn.get("hints") or ():
            if marker := hint.get("marker"):
                counts[marker] += 1
        for candidate in turn.get("candidates") or ():
            if candidate.get("more_room"):
                counts["more room"] += 1
                counts["finished"] += candidate["finish_reason"] == "eos"
    return counts


def describe_tries(counts: Mapping[str, int]) -> list[str]:
    """For a person; nothing where there were no such ones."""
    lines = []
    if model_or_us := counts.get("model", 0) + counts.get("appended", 0):
        lines.append(
            f"analyses with a marker: {model_or_us:,}, {counts.get('model', 0):,} by the model,"
            f" {counts.get('appended', 0):,} appended"
        )
    if wider := counts.get("more room", 0):
        lines.append(f"responses decoded with more room: {wider:,}, of which {counts.get('finished', 0):,} then ended")
    return lines


def describe_methods(methods: Mapping[str, int]) -> str:
    """For a person: kept turns: 7 right (5 exact, 2 number), 1 UNVERIFIED, 2 by the model's judgement, 3 original."""
    others = (UNVERIFIED, ORIGINAL, BY_MODEL)
    right = {name: n for name, n in sorted(methods.items()) if n and name not in others}
    by = f" ({', '.join(f'{count:,} {bounded(name)}' for name, count in right.items())})" if right else ""
    text = f"kept turns: {sum(right.values()):,} right{by}, {methods.get(UNVERIFIED, 0):,} {UNVERIFIED}"
    if methods.get(BY_MODEL):
        text += f", {methods[BY_MODEL]:,} right only by the model's own judgement"
    return text + (f", {methods[ORIGINAL]:,} left as they were" if methods.get(ORIGINAL) else "")

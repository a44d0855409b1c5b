"""What became of each record: one Parquet row, with the provenance of every assistant turn and of every try at it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from megatron_idft.corpus.display import bounded

# One try at a turn. stage: how it was made. accepted: it went into the output.
CANDIDATE = pa.struct(
    [
        ("stage", pa.string()),  # rollout | hinted | retry
        ("seed", pa.int64()),
        ("slope", pa.float64()),  # of the mixing; null for rollouts
        ("accepted", pa.bool_()),
        ("rejected_because", pa.string()),  # wrong | unverified | unfinished | leak | null
        ("verdict", pa.string()),  # right | wrong | unknown; null where nothing could be compared
        ("verified_by", pa.string()),  # exact | number | math-verify | module:function
        ("extracted", pa.string()),  # the final answer found in the text
        ("leak", pa.string()),  # the phrase that betrays the hint
        ("finish_reason", pa.string()),  # eos | length | context | repetition
        ("text", pa.string()),
        ("num_tokens", pa.int32()),
        ("split_at", pa.int32()),  # tokens before the hinted stream was dropped; null: never
        ("hint_share_mean", pa.float32()),  # over the tokens drawn from two streams; null for rollouts
        ("hint_share_min", pa.float32()),
        ("log_prob_sum", pa.float64()),  # nats, under the plain prompt at temperature 1, as phi
        ("entropy_sum", pa.float64()),
        ("phi_sum", pa.float64()),
        ("phi_squared_sum", pa.float64()),
        ("phi_below_1", pa.int32()),  # tokens
        ("phi_below_3", pa.int32()),
        ("phi_below_5", pa.int32()),
    ]
)

# Why a stage that was run, or was to be run, gave a turn no text.
FAILURE = pa.struct(
    [
        ("stage", pa.string()),  # as of a candidate
        ("reason", pa.string()),  # of its candidates' rejections, each once; or why there was none
    ]
)

# One assistant turn of the record.
TURN = pa.struct(
    [
        ("message", pa.int32()),  # its index in `messages`
        ("stage", pa.string()),  # rollout | hinted | retry | original; null where the record was dropped here
        ("reason", pa.string()),  # why no candidate was accepted, by the last stage; null where one was
        ("num_prompt_tokens", pa.int32()),
        ("num_hinted_prompt_tokens", pa.int32()),  # null where no hinted stream ran
        ("analysis_tokens", pa.int32()),  # written by the model; null: none, or read from a file
        ("analysis_text", pa.string()),  # the head of one without a marker, to see what went wrong; else null
        ("original_text", pa.string()),
        # The original response under the plain prompt.
        ("original_num_tokens", pa.int32()),
        ("original_log_prob_sum", pa.float64()),
        ("original_entropy_sum", pa.float64()),
        ("original_phi_sum", pa.float64()),
        ("original_phi_squared_sum", pa.float64()),
        ("original_phi_below_1", pa.int32()),
        ("original_phi_below_3", pa.int32()),
        ("original_phi_below_5", pa.int32()),
        ("candidates", pa.list_(CANDIDATE)),
        ("failures", pa.list_(FAILURE)),  # by stage, in order; empty where a candidate was accepted
        # Of the accepted candidate, per token; empty where the turn is the original.
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("hint_share", pa.list_(pa.float32())),  # 0 where the plain stream ran alone
        ("phi", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),  # of the plain stream
        ("hinted_entropy", pa.list_(pa.float32())),  # NaN without a hinted stream
    ]
)

OUTCOME_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # of the record in the input
        ("id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("source", pa.string()),
        ("status", pa.string()),  # kept | dropped | error
        ("reason", pa.string()),  # why it was not kept
        ("record", pa.string()),  # the record to write, as JSON; null unless kept
        ("token_ids", pa.list_(pa.int32())),  # of the whole conversation; null where the template is to tokenize it
        ("loss_mask", pa.list_(pa.uint8())),
        ("turns", pa.list_(TURN)),
    ]
)

STAGE_NAMES = {"rollout": "own response", "hinted": "hinted", "retry": "retry"}  # for a person
UNVERIFIED, ORIGINAL = "UNVERIFIED", "original"
_TURNS = "turns.list.element"
_CANDIDATES = f"{_TURNS}.candidates.list.element"
FAILURE_COLUMNS = [f"{_TURNS}.failures.list.element.{name}" for name in ("stage", "reason")]
METHOD_COLUMNS = [f"{_TURNS}.stage"] + [f"{_CANDIDATES}.{name}" for name in ("accepted", "verdict", "verified_by")]


def describe_reason(row: Mapping[str, Any]) -> str | None:
    """Why a record was not kept: what failed in each stage of the turn that it was given up for, else its reason.

    Folders written before there were `failures` have the last stage's reason alone.
    """
    turns = row.get("turns") or ()
    failures = (turns[-1].get("failures") or ()) if turns and row["status"] == "dropped" else ()
    by_stage = [f"{STAGE_NAMES.get(failure['stage'], failure['stage'])}: {failure['reason']}" for failure in failures]
    return "; ".join(by_stage) or row.get("reason")


def count_methods(turns: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """By what the text of each of these kept turns was found right: verified_by; UNVERIFIED: by nothing; original."""
    return Counter(map(_method, turns))


def _method(turn: Mapping[str, Any]) -> str:
    accepted = next((candidate for candidate in turn["candidates"] or () if candidate["accepted"]), None)
    if accepted is None:
        return ORIGINAL
    return accepted["verified_by"] if accepted["verdict"] == "right" and accepted["verified_by"] else UNVERIFIED


def describe_methods(methods: Mapping[str, int]) -> str:
    """For a person: kept turns: 7 right (5 exact, 2 number), 1 UNVERIFIED, 3 original."""
    right = {name: n for name, n in sorted(methods.items()) if n and name not in (UNVERIFIED, ORIGINAL)}
    by = f" ({', '.join(f'{count:,} {bounded(name)}' for name, count in right.items())})" if right else ""
    text = f"kept turns: {sum(right.values()):,} right{by}, {methods.get(UNVERIFIED, 0):,} {UNVERIFIED}"
    return text + (f", {methods[ORIGINAL]:,} left as they were" if methods.get(ORIGINAL) else "")

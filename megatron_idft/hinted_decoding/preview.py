"""The prompts that the model would be shown, and the prospects of a run, as text for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import Record
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate
from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.named_prompts import NamedPrompts
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.stages.tasks import RealignInput, RecordTask


def render_prompts(record: Record, tokenizer: ChatTokenizer, named: NamedPrompts, max_positions: int) -> str:
    """The plain prompt of a record's first assistant turn, and those with each of the hint prompts, if any.

    Raises:
        InputError: the record cannot be realigned.
    """
    task = RecordTask(RealignInput(0, record), tokenizer, max_positions, open_end=not named.templates)
    turn = task.begin(0)
    if turn is None:
        raise InputError(f"{record.file}, line {record.line}: {task.error}")
    parts = [(f"plain prompt, {len(turn.prompt.ids)} tokens", turn.prompt.text)]
    if named.auto:
        names = ", ".join(template.name for template in named.templates)
        parts.append(("hint prompts", f"a trial before the run chooses among these: {names}"))
    for template in named.templates:
        asked, _ = turn.ask_by(template, tokenizer)
        if template.marker is None:
            parts.append((f"hinted prompt ({template.name})", asked))
        else:
            parts.append((f"analysis prompt ({template.name})", asked))
            after = f"{template.marker}{template.after_marker}".rstrip("\n")
            parts.append((f"hinted prompt ({template.name})", f"the same, the model's analysis, and then:\n{after}"))
    if not named.templates:
        return f"> {parts[0][0]}:\n{parts[0][1]}"
    parts.append(("original response", tokenizer.decode(turn.prompt.original_ids)))
    parts.append(("reference answer", "none: this turn cannot be verified" if turn.answer is None else turn.answer))
    return "\n\n".join(f"> {title}:\n{text}" for title, text in parts)


def describe_unreferenced(records: Sequence[Record], total: int, policy: str) -> str | None:
    """The fate of records with a turn that has no reference; None where there is none among `records`.

    Args:
        records: some records, spread over the corpus.
        total: the number of records of the corpus.
        policy: of --unverified; "model" with --verifier model.
    """
    found = sum(not _all_referenced(record) for record in records)
    if not found:
        return None
    seen = f"{found:,} of {len(records):,} records looked at (of {total:,}) have a turn without a reference answer"
    fate = {
        "drop": "they are left out undecoded (--unverified drop; keep takes what nothing verifies)",
        "original": "those turns stay as they are (--unverified original)",
        "model": "the model judges what it writes there (--verifier model)",
        "keep": "for those turns the first finished response is taken, right or wrong (--unverified keep)",
    }[policy]
    if policy == "drop" and found == len(records):
        return (
            f'> WARNING: {seen}: everything would be dropped. Give the records an "answer", or pass --unverified keep'
            " to take responses that nothing verifies."
        )
    return f"> {seen}: {fate}"


def _all_referenced(record: Record) -> bool:
    """Whether each turn that is written anew has a reference, but for texts beside tool calls, which may stay."""
    turns = [message for message in record.messages if message["role"] == "assistant"]
    answered = record.answer not in (None, "")
    rewritten = [m for m in turns[: len(turns) - answered] if trained_weight(m) > 0 and not m.get("tool_calls")]
    return all(final_answer(str(message["content"])) is not None for message in rewritten)


class EstimateSums(ClusterSums):
    """Records, and phi summed over the tokens of the rewritten turns of kept records, old text and new."""

    fields = ("one", "kept", "errors", "before", "before_tokens", "after", "after_tokens")


def summary_row(row: OutcomeRow) -> dict[str, float]:
    """The fields of EstimateSums for a row of OUTCOME_SCHEMA."""
    kept = row["status"] == "kept"
    found = dict.fromkeys(EstimateSums.fields, 0.0) | {"one": 1.0, "kept": kept, "errors": row["status"] == "error"}
    for turn in row["turns"] if kept else ():
        for candidate in turn["candidates"]:
            if candidate["accepted"]:
                found["before"] += turn["original_phi_sum"]
                found["before_tokens"] += turn["original_num_tokens"]
                found["after"] += candidate["phi_sum"]
                found["after_tokens"] += candidate["num_tokens"]
    return found


def describe_estimate(rows: Sequence[Mapping[str, float]], seconds: float, total: int, replicas: int) -> str:
    """Hours, kept share and phi to expect of the whole corpus.

    Args:
        rows: of `summary_row`.
        seconds: the time that this launch needed for them.
        total: the number of records of the corpus.
        replicas: of this launch.
    """
    sums = EstimateSums()
    for row in rows:
        sums.add(row)
    hours = seconds * total / max(len(rows), 1) / 3600
    return (
        f"> {len(rows):,} of {total:,} records in {seconds:.1f} s on {replicas} replica{'s' * (replicas > 1)}: about"
        f" {hours:.2f} hours for all in one such launch\n"
        f"> kept: {_shown(sums.ratio('kept', 'one'), '.1%')} of the records, errors: {int(sums['errors'])}\n"
        f"> mean of phi per token of rewritten turns: {_shown(sums.ratio('before', 'before_tokens'))} before,"
        f" {_shown(sums.ratio('after', 'after_tokens'))} after"
    )


def _shown(estimate: Estimate | None, form: str = "+.4f") -> str:
    if estimate is None:
        return "unknown"
    error = "" if estimate.se is None else f" ± {estimate.se:{form.removeprefix('+')}}"
    return f"{estimate.value:{form}}{error}"

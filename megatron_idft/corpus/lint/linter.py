"""Verdicts on a scored corpus in plain language, each with its threshold, where that comes from, and its limits.

No check reads a mean of phi below zero as bad data: for x drawn from q, E[phi] = H(p) - H(q) - KL(q||p), so the sign
also depends on the difference of the entropies of model and data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_idft.corpus.lint.distance import check_distance, check_template
from megatron_idft.corpus.lint.finding import LOOK, NOT_CHECKED, OK, PROBLEM, Finding, said
from megatron_idft.corpus.lint.thresholds import (
    ERRORS_SOURCE,
    FEW,
    FEW_SOURCE,
    PROMPT_IN_SPAN,
    PROMPT_RUN_SHARE,
    PROMPT_RUN_TOKENS,
    REPEATED_RECORDS,
    REPEATED_RESPONSE_TOKENS,
    REPEATED_RESPONSES,
    SHORT,
    SHORT_TOKENS,
    STANDARD_ERRORS,
    can_tell,
)
from megatron_idft.corpus.scores.rows import ScoredRow
from megatron_idft.corpus.scores.summary import CorpusSummary


def _prompt_in_span(row: ScoredRow) -> bool:
    share = row.get("prompt_overlap") or 0.0
    return share >= PROMPT_RUN_SHARE and share * row["num_tokens"] >= PROMPT_RUN_TOKENS


def _words(row: ScoredRow) -> int:
    return int(row["num_tokens"]) - bool(row["ends_turn"])


# `CorpusSummary` tallies the rows that fulfil these.
ROW_TESTS: dict[str, Callable[[ScoredRow], bool]] = {
    "no end of turn": lambda row: not row["ends_turn"] and not row["truncated"],
    "truncated": lambda row: bool(row["truncated"]),
    "prompt in span": _prompt_in_span,
    "template markers": lambda row: bool(row.get("template_markers")),
    "empty": lambda row: _words(row) <= 0,
    "short": lambda row: 0 < _words(row) <= SHORT_TOKENS,
}


def lint(corpus: CorpusSummary, null: CorpusSummary | None = None) -> list[Finding]:
    """All findings on a corpus, in a fixed order.

    Args:
        corpus: which has tallied `ROW_TESTS`.
        null: samples of the same model at temperature 1, scored the same way. Not used where it fails its own check, or
            holds too few records.
    """
    if not corpus.records:
        return []
    if null is not None and any(finding.verdict != OK for finding in lint_null(null, 1.0)):
        null = None
    return [*check_template(corpus, null), *_shares(corpus), *_duplicates(corpus), *check_distance(corpus, null)]


def lint_null(null: CorpusSummary, temperature: float) -> list[Finding]:
    """Whether a model's own samples lie where mathematics puts them: the check of the measurement itself."""
    mean = null.total().ratio("phi")
    if mean is None:
        return []
    value = {"phi_mean": mean.as_json(), "records": null.records}
    judged = can_tell(null.records, mean)
    if temperature == 1:
        fine = judged and abs(mean.value) <= STANDARD_ERRORS * (mean.se or 0)
        threshold = f"mean phi within {STANDARD_ERRORS:g} standard errors of 0"
    elif temperature < 1:
        fine = judged and mean.exceeds(0, STANDARD_ERRORS)
        threshold = f"mean phi above 0 by {STANDARD_ERRORS:g} standard errors"
    else:
        fine = judged and mean.value < -STANDARD_ERRORS * (mean.se or 0)
        threshold = f"mean phi below 0 by {STANDARD_ERRORS:g} standard errors"
    return [
        Finding(
            "own samples",
            NOT_CHECKED if not judged else OK if fine else PROBLEM,
            f"Own samples at temperature {temperature:g}: mean phi {said(mean)} over {null.records:,} records.",
            value,
            threshold,
            "mathematics: the expectation of log p is minus the entropy, so phi averages to 0 at temperature 1, and to"
            f" more than 0 below it. The standard errors are {ERRORS_SOURCE}",
            "Where this fails, sampling and scoring disagree: another template, temperature, nucleus or top-k"
            " sampling, another checkpoint. Nothing else on this page can be trusted until it holds.",
            "That it holds says nothing about the corpus, nor that the template is the right one: only that sampling"
            " and scoring used the same.",
        )
    ]


_SHARE_CHECKS = (
    (
        "end of turn",
        "no end of turn",
        FEW,
        FEW_SOURCE + "; why it matters: users of DFT report models that never learn to stop"
        " (github.com/yongliang-wu/DFT issues 1 and 10)",
        "{count} of {records} responses ({share}) that were not truncated do not end with an end-of-turn token.",
        "A model trained on responses without an end does not learn to stop.",
        "Corpora of partial turns, or of plain text, lack it on purpose.",
    ),
    (
        "truncated responses",
        "truncated",
        FEW,
        FEW_SOURCE,
        "{count} of {records} records ({share}) were cut at the maximum length.",
        "The model sees answers that break off, and never their end. Raise the length, or drop these records.",
        "It does not say that the beginnings of these records are at fault.",
    ),
    (
        "prompt in the trained text",
        "prompt in span",
        PROMPT_IN_SPAN,
        "ours: chosen so that quotations pass, while answers that restate the question are shown, and a corpus in which"
        " one in five does is questioned",
        "In {count} of {records} records ({share}) the trained text begins with a run from the prompt: at least"
        f" {PROMPT_RUN_TOKENS} tokens and {PROMPT_RUN_SHARE:.0%} of it.",
        "The loss mask may include the prompt, or the corpus may repeat the prompt inside the response: then the model"
        " is trained to write questions.",
        "Tasks such as editing or translation copy from the prompt rightly.",
    ),
    (
        "chat markers in the trained text",
        "template markers",
        FEW,
        FEW_SOURCE,
        "{count} of {records} records ({share}) hold chat markers or other special tokens inside the trained text.",
        "Conversations that were rendered before and stored as text, or a template applied twice: the model learns to"
        " write turn headers itself.",
        "Some templates put special tokens into answers on purpose (thinking, tools).",
    ),
    (
        "empty responses",
        "empty",
        FEW,
        FEW_SOURCE,
        "{count} of {records} responses ({share}) hold no token but the end of turn.",
        "The model learns to answer with silence.",
        "It does not say why: the text may have been lost before scoring, or may never have been there.",
    ),
    (
        "very short responses",
        "short",
        SHORT,
        "ours: chosen so that a few short answers pass, while a corpus of labels is asked about",
        f"{{count}} of {{records}} responses ({{share}}) hold {SHORT_TOKENS} tokens or fewer before the end of turn.",
        "Answers lost in conversion look like this; and a mean over so few tokens says little about a record.",
        "Classification and arithmetic have such answers rightly.",
    ),
)


def _shares(corpus: CorpusSummary) -> Iterator[Finding]:
    for check, tally_name, limits, source, result, means, not_proven in _SHARE_CHECKS:
        tally = corpus.tallies[tally_name]
        yield _share_finding(
            corpus, check, tally.count, limits, source, result, means, not_proven, {"examples": tally.examples}
        )


def _duplicates(corpus: CorpusSummary) -> Iterator[Finding]:
    records = corpus.table.repeated_records()
    yield _share_finding(
        corpus,
        "repeated records",
        records["repeats"],
        REPEATED_RECORDS,
        "ours: chosen so that one accident in a thousand passes, while one record in twenty is a fault of the pipeline",
        "{count} of {records} records ({share}) repeat an earlier one, prompt and response.",
        "A repeated record counts twice in training, and may leak from the training into the validation set.",
        "Texts that differ by more than blanks are not found, however alike they are.",
        records,
    )
    responses = corpus.table.repeated_responses(REPEATED_RESPONSE_TOKENS)
    yield _share_finding(
        corpus,
        "repeated responses",
        responses["repeats"],
        REPEATED_RESPONSES,
        f"ours: chosen so that ordinary set phrases pass; responses of fewer than {REPEATED_RESPONSE_TOKENS} tokens are"
        " not counted",
        "{count} of {records} records ({share}) give an earlier record's response to another prompt.",
        "Prompts and responses may have been joined wrongly, or the corpus holds templated answers.",
        "Refusals and greetings are repeated rightly.",
        responses,
    )


def _share_finding(
    corpus: CorpusSummary,
    check: str,
    count: int,
    limits: tuple[float, float],
    source: str,
    result: str,
    means: str,
    not_proven: str,
    evidence: Mapping[str, Any],
) -> Finding:
    share = count / corpus.records
    look, problem = limits
    threshold = f"look above {look:.1%}, problem above {problem:.0%} of the records"
    return Finding(
        check,
        PROBLEM if share > problem else LOOK if share > look else OK,
        result.format(count=f"{count:,}", records=f"{corpus.records:,}", share=f"{share:.1%}"),
        {"records": count, "share": share},
        threshold.replace("above 0.0%", "at any"),
        source,
        means,
        not_proven,
        evidence,
    )

"""The linter's checks of phi: the template, the edges of responses, the distance from the model, foreign sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_idft.corpus.lint.finding import LOOK, NOT_CHECKED, OK, PROBLEM, Finding, said
from megatron_idft.corpus.lint.thresholds import (
    ALARM_SOURCE,
    DISTANCE_SOURCE,
    END_OF_TURN_LOOK,
    END_OF_TURN_PROBLEM,
    ERRORS_SOURCE,
    FIRST_TOKENS_LOOK,
    FIRST_TOKENS_PROBLEM,
    FOREIGN_STD_LINE,
    MIN_RECORDS,
    OUT_OF_DISTRIBUTION_MEAN,
    PHI_MEAN_ALARM,
    PHI_MEAN_HIGH,
    PHI_STD_ALARM,
    SHARE_BELOW_5_ALARM,
    STANDARD_ERRORS,
    STD_RATIO,
)
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate
from megatron_idft.corpus.scores.summary import FIRST_TOKENS, CorpusSummary


def check_template(corpus: CorpusSummary, null: CorpusSummary | None) -> Iterator[Finding]:
    total = corpus.total()
    mean, std, below = total.ratio("phi"), total.std(), total.ratio("below_5")
    if corpus.not_finite.count:
        yield Finding(
            "numbers",
            PROBLEM,
            f"{corpus.not_finite.count:,} records have NaN or infinite scores and are left out of all numbers.",
            {"records": corpus.not_finite.count},
            "none",
            "mathematics: log-probabilities of a sound model are finite",
            "The model gave NaN or infinite logits: a damaged checkpoint, an overflow in fp16, or a fault in scoring.",
            "It does not say that the text of these records is at fault.",
            {"examples": corpus.not_finite.examples},
        )
    if mean is None or std is None or below is None:
        return
    signs = _template_signs(total)
    verdict = PROBLEM if signs >= 2 else LOOK if signs else OK
    result = f"Mean phi {said(mean)}, spread {std.value:.2f}, {below.value:.1%} of the tokens below -5."
    # One template wrote all sources: where it fits one of them, it is another's text that does not fit the model.
    fits = [
        name for name, source in corpus.sources.items() if source.sums.records >= MIN_RECORDS and _fits(source.sums)
    ]
    if verdict == PROBLEM and fits:
        verdict = LOOK
        result += f" But source {fits[0]!r}, under the same template, shows no sign of a wrong one."
    yield Finding(
        "chat template",
        verdict,
        result,
        {"phi_mean": mean.as_json(), "phi_std": std.as_json(), "phi_below_5": below.as_json()},
        f"look at one of, problem at two of and in every source: mean ≤ {PHI_MEAN_ALARM:g}, spread ≥"
        f" {PHI_STD_ALARM:g}, more than {SHARE_BELOW_5_ALARM:.0%} of the tokens below -5",
        f"{ALARM_SOURCE}. Half of the tokens below -5: a third-party guide to DDT fails there",
        "Numbers like these come from a wrong or missing chat template, the wrong tokenizer, shuffled columns or a"
        " damaged checkpoint far more often than from unusual text. Look at the first rendered prompt (--dry-run).",
        "A wrong template that the model has partly seen can stay below these lines; and text in a language or format"
        " that the model does not know can cross them.",
    )
    yield from _edges(corpus, null)


def _template_signs(sums: ClusterSums) -> int:
    mean, std, below = sums.ratio("phi"), sums.std(), sums.ratio("below_5")
    assert mean is not None and std is not None and below is not None
    return sum([mean.value <= PHI_MEAN_ALARM, std.value >= PHI_STD_ALARM, below.value > SHARE_BELOW_5_ALARM])


def _fits(sums: ClusterSums) -> bool:
    return sums.records >= MIN_RECORDS and sums["tokens"] > 0 and _template_signs(sums) == 0


def _edges(corpus: CorpusSummary, null: CorpusSummary | None) -> Iterator[Finding]:
    total = corpus.total()
    first = total.first_against_rest()
    first_check = (
        "first tokens of responses",
        f"look below {FIRST_TOKENS_LOOK:g}, problem below {FIRST_TOKENS_PROBLEM:g} nats, and by {STANDARD_ERRORS:g}"
        " standard errors",
        "ours: chosen so that a drop counts when it makes the first tokens less likely by a factor of e, or e²;"
        f" a model's own samples have no drop at any position. The standard errors are {ERRORS_SOURCE}",
        "Where responses begin far below the rest, the model expected something else there: a missing generation"
        " prompt, a missing or doubled turn header, or a blank or newline too many.",
        "A corpus whose answers all open with a phrase that this model never uses shows the same.",
    )
    end_check = (
        "end-of-turn token",
        f"look below {END_OF_TURN_LOOK:g}, problem below {END_OF_TURN_PROBLEM:g}"
        + (", and below the own samples by as much" if null else ""),
        "ours: chosen at the levels -3 and -5 at which the authors' Hinted Decoding demo counts tokens, so that an end"
        " which the model merely did not expect yet passes",
        "A model that finds the end of the turn this unlikely expects another token there (for example <|endoftext|>"
        " where the template writes <|im_end|>), or more text: check which token ends turns in this model's template.",
        "A base model that never saw chat turns also finds their end unlikely; training has to teach it.",
    )
    if first is None or total["listed_tokens"] == 0:
        for name, threshold, source, means, not_proven in (first_check, end_check):
            result = "The scores per token were not kept (or each response has only a few tokens)."
            yield Finding(name, NOT_CHECKED, result, {}, threshold, source, means, not_proven)
        return
    name, threshold, source, means, not_proven = first_check
    enough = first.se is not None and corpus.records >= MIN_RECORDS
    drop = Estimate(-first.value, first.se)
    verdict = PROBLEM if drop.exceeds(-FIRST_TOKENS_PROBLEM, STANDARD_ERRORS) else LOOK
    verdict = verdict if drop.exceeds(-FIRST_TOKENS_LOOK, STANDARD_ERRORS) else OK
    result = f"The first {FIRST_TOKENS} tokens of responses lie {said(first)} from the rest in mean phi."
    value: dict[str, Any] = {"difference": first.as_json()}
    yield Finding(name, verdict if enough else NOT_CHECKED, result, value, threshold, source, means, not_proven)

    name, threshold, source, means, not_proven = end_check
    end, reference = total.ratio("end_phi", "end_tokens"), null.total().ratio("end_phi", "end_tokens") if null else None
    if end is None:
        result = "No response ends with an end-of-turn token."
        yield Finding(name, NOT_CHECKED, result, {}, threshold, source, means, not_proven)
        return
    # phi at a token chosen for what it is has no mean of 0, not even on own samples: those are the measure if known.
    level = end.value - (reference.value if reference else 0.0)
    verdict = PROBLEM if level <= END_OF_TURN_PROBLEM else LOOK if level <= END_OF_TURN_LOOK else OK
    result = f"Mean phi of the token that ends the turn: {said(end)}" + (
        f"; on own samples {said(reference)}." if reference else "."
    )
    value = {"phi_mean": end.as_json(), "own_samples": reference.as_json() if reference else None}
    yield Finding(name, verdict, result, value, threshold, source, means, not_proven)


def check_distance(corpus: CorpusSummary, null: CorpusSummary | None) -> Iterator[Finding]:
    total = corpus.total()
    mean, std = total.ratio("phi"), total.std()
    if mean is None or std is None:
        return
    reasons = _foreign(total, null.total() if null else None, absolute=True)
    high = mean.value > PHI_MEAN_HIGH
    if high:
        reasons.append(f"mean {said(mean)} above {PHI_MEAN_HIGH:g}: sharper than the model's own samples")
    against = "the model's own samples" if null else "published values, because there are no own samples that can serve"
    yield Finding(
        "distance from the model",
        LOOK if reasons else OK,
        f"Mean phi {said(mean)}, spread {std.value:.3f}, against {against}"
        + (f": {'; '.join(reasons)}." if reasons else ": nothing unusual."),
        {"phi_mean": mean.as_json(), "phi_std": std.as_json(), "against_own_samples": null is not None},
        _distance_threshold(null is not None) + f"; or mean above {PHI_MEAN_HIGH:g}",
        f"{DISTANCE_SOURCE}. The standard errors are {ERRORS_SOURCE}",
        "Far from the model, plain cross-entropy overwrites more of what the model knows; IDFT and DFT give such tokens"
        " little weight, and Hinted Decoding rewrites the records. Above 0.5: greedy or cold samples, or copied text.",
        "Distance is not badness: a model learns only from what it would not have written. A negative mean is not bad"
        " data; its sign also depends on the difference of the entropies of model and data. The published values are"
        " of mathematics on models of 1.5B to 7B; a model of higher entropy spreads further on its own samples.",
    )
    yield _sources(corpus, null)


def _sources(corpus: CorpusSummary, null: CorpusSummary | None) -> Finding:
    foreign: list[dict[str, Any]] = []
    judged, total = 0, corpus.total()
    for name, part in corpus.sources.items() if len(corpus.sources) > 1 else ():
        rest = total.without(part.sums)
        if part.sums.records < MIN_RECORDS or (null is None and rest.records < MIN_RECORDS):
            continue
        judged += 1
        reference = null.total() if null else rest
        if reasons := _foreign(part.sums, reference, absolute=False):
            mean, std = part.sums.ratio("phi"), part.sums.std()
            assert mean is not None and std is not None
            entry: dict[str, Any] = {"source": name, "records": part.sums.records, "reasons": reasons}
            entry |= {"phi_mean": mean.as_json(), "phi_std": std.as_json()}
            rest_mean, rest_std = rest.ratio("phi"), rest.std()
            if rest_mean and rest_std:
                entry |= {"phi_mean_of_the_rest": rest_mean.as_json(), "phi_std_of_the_rest": rest_std.as_json()}
            foreign.append(entry)
    against = "the model's own samples" if null else "the other sources"
    result = f"{len(foreign)} of {judged} sources lie far from {against}."
    skipped = len(corpus.sources) - judged
    if len(corpus.sources) == 1:
        result = "All records have the same source: see the distance from the model."
    elif skipped:
        result += f" {skipped} not judged: too few records, or nothing to compare with."
    foreign.sort(key=lambda entry: (-entry["phi_std"]["value"], str(entry["source"])))
    return Finding(
        "foreign sources",
        LOOK if foreign else OK if judged else NOT_CHECKED,
        result,
        {"sources": len(corpus.sources), "judged": judged, "foreign": len(foreign)},
        f"against {against}: {_distance_threshold(True)}",
        f"{DISTANCE_SOURCE}. The standard errors are {ERRORS_SOURCE}",
        "These records were written by another hand than the rest, or follow another format. Look at the records of"
        " the source, and train on it knowingly: with IDFT, rewritten by Hinted Decoding, or left out.",
        "A foreign source is not a bad one; it may be exactly what the model should learn. Without own samples only"
        " the difference between sources is seen, not which of them is near the model.",
        {"foreign": foreign},
    )


def _distance_threshold(compared: bool) -> str:
    if not compared:
        return f"look at a spread of {FOREIGN_STD_LINE:g} or more, or a mean of {OUT_OF_DISTRIBUTION_MEAN:g} or less"
    return (
        f"look at a spread of {STD_RATIO:g} times theirs or more, or a mean {-OUT_OF_DISTRIBUTION_MEAN:g} or more below"
        f" theirs, in either case by {STANDARD_ERRORS:g} standard errors"
    )


def _foreign(sums: ClusterSums, reference: ClusterSums | None, *, absolute: bool) -> list[str]:
    """Why these records lie far from the reference (or, without one, from published values)."""
    mean, std, reasons = sums.ratio("phi"), sums.std(), []
    if mean is None or std is None:
        return []
    if reference is None:
        if absolute and std.value >= FOREIGN_STD_LINE:
            reasons.append(f"spread {std.value:.2f}, like foreign data in the published runs")
        if absolute and mean.value <= OUT_OF_DISTRIBUTION_MEAN:
            reasons.append(f"mean {said(mean)} below {OUT_OF_DISTRIBUTION_MEAN:g}")
        return reasons
    mean_there, std_there = reference.ratio("phi"), reference.std()
    if mean_there is None or std_there is None:
        return []
    wider = std.minus(std_there)
    if wider.exceeds((STD_RATIO - 1) * std_there.value, STANDARD_ERRORS):
        reasons.append(f"spread {std.value:.2f} against {std_there.value:.2f}")
    lower = mean_there.minus(mean)
    if lower.exceeds(-OUT_OF_DISTRIBUTION_MEAN, STANDARD_ERRORS):
        reasons.append(f"mean {said(mean)} against {said(mean_there)}")
    return reasons

"""A trial of hint prompts on some records: what each of them leads to, and which are taken.

A prompt is tried by hinted decoding as the job does it, once for each turn: no own response, no retry, no second
prompt. A turn counts as kept where its response would be.

The choice is made by the share of turns that are kept. Prompts within one standard error of the best are taken for
equals, and among them the one with the highest mean phi is first, or, where that is equal too, the one that was named
first. The second prompt is the best of the other kind, with or without an analysis, if it kept anything.
Where no turn has an answer to compare with, "kept" means what it does for the job: ended by itself and without a
phrase that betrays the hint. Then the choice says nothing about right or wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from megatron_idft.corpus.scores.display import bounded
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate, EstimateNumbers
from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.errors import InputError
from megatron_idft.files import write_atomically
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.output.results import TRIAL
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings

CHOICE = "prompts.json"  # in the output folder
FORMAT = 1
_MOST, _LEAST, _OF_CORPUS = 32, 4, 8  # records by default: an eighth of the corpus between these
_OTHER_DRAWS = 1_000_003  # added to the seed: what was chosen for its luck is not written again


class PromptNumbers(TypedDict):
    """A prompt's results. Shares are of the turns; tokens are of responses and analyses, all that were decoded.

    Attributes:
        right: None where no turn has an answer.
        bare: of responses rejected as such, that are hardly more than the answer which the prompt shows.
        phi: mean per token of what was kept; None where there is nothing.
    """

    name: str
    sha256: str
    analysis: bool
    records: int
    turns: int
    turns_with_answer: int
    right: EstimateNumbers | None
    kept: EstimateNumbers | None
    bare: EstimateNumbers | None
    phi: EstimateNumbers | None
    tokens_per_turn: EstimateNumbers | None
    tokens: int


class TrialSums(ClusterSums):
    """Contributions of one record."""

    fields = ("turns", "answered", "right", "kept", "bare", "phi", "phi_tokens", "tokens")


def trial_size(total: int, asked: int | None) -> int:
    """The number of records to try on.

    Args:
        total: of the corpus.
        asked: None: the default.
    """
    return min(total, min(_MOST, max(_LEAST, total // _OF_CORPUS)) if asked is None else asked)


def trial_indices(total: int, size: int) -> list[int]:
    """So many records, spread over the corpus."""
    return sorted({int(index) for index in np.linspace(0, total - 1, size)}) if size else []


def trial_settings(settings: RealignSettings, template: HintTemplate) -> RealignSettings:
    """Those of the job, for one try of one prompt at every turn of a record."""
    return replace(
        settings,
        seed=settings.seed + _OTHER_DRAWS,
        templates=(template,),
        rollout_samples=0,
        more_room=0.0,
        retries=0,
        fallback="original",
        unverified="keep" if settings.unverified == "keep" else "original",
    )


def measure(template: HintTemplate, rows: Iterable[OutcomeRow]) -> PromptNumbers:
    """The results of a prompt.

    Args:
        template: the prompt.
        rows: of a Realigner with `trial_settings`.
    """
    sums = TrialSums()
    for row in rows:
        sums.add(_contribution(row))
    return {
        "name": template.name,
        "sha256": template.sha256,
        "analysis": template.marker is not None,
        "records": sums.records,
        "turns": int(sums["turns"]),
        "turns_with_answer": int(sums["answered"]),
        "right": _json(sums.ratio("right", "answered")),
        "kept": _json(sums.ratio("kept", "turns")),
        "bare": _json(sums.ratio("bare", "turns")),
        "phi": _json(sums.ratio("phi", "phi_tokens")),
        "tokens_per_turn": _json(sums.ratio("tokens", "turns")),
        "tokens": int(sums["tokens"]),
    }


def _contribution(row: OutcomeRow) -> dict[str, float]:
    found = dict.fromkeys(TrialSums.fields, 0.0)
    answered = row["record"] is not None and json.loads(row["record"]).get("answer") not in (None, "")
    for number, turn in enumerate(row["turns"], 1):
        if not turn["candidates"] and not turn["failures"]:
            continue  # without an answer, and the job does not try such turns
        last = number == len(row["turns"])
        found["turns"] += 1
        comparable = final_answer(turn["original_text"]) is not None or (last and answered)
        found["answered"] += comparable
        found["tokens"] += sum(hint["analysis_tokens"] or 0 for hint in turn["hints"])
        for candidate in turn["candidates"]:
            found["tokens"] += candidate["num_tokens"]
            found["right"] += comparable and candidate["verdict"] == "right"
            found["bare"] += candidate["rejected_because"] == "bare"
            if candidate["accepted"]:
                found["kept"] += 1
                found["phi"] += candidate["phi_sum"]
                found["phi_tokens"] += candidate["num_tokens"]
    return found


def choose(found: Sequence[PromptNumbers]) -> list[int]:
    """Which prompts are taken, in order: indices of one or two of them."""
    everything = range(len(found))
    first = _best(found, everything)
    others = [i for i in everything if found[i]["analysis"] != found[first]["analysis"] and _share(found[i]).value > 0]
    return [first, _best(found, others)] if others else [first]


def _best(found: Sequence[PromptNumbers], among: Sequence[int]) -> int:
    best = max((_share(found[i]) for i in among), key=lambda share: share.value)
    equals = [i for i in among if _share(found[i]).value >= best.value - (best.se or 0.0)]
    return max(equals, key=lambda i: (found[i]["phi"] or {"value": -math.inf})["value"])  # the first of equals


def _share(found: PromptNumbers) -> Estimate:
    share = found["kept"]
    return Estimate(0.0, None) if share is None else Estimate(share["value"], share["se"])


def describe_trial(found: Sequence[PromptNumbers], order: Sequence[int]) -> list[str]:
    """The results and the choice as lines for a person."""
    turns, answered = max(p["turns"] for p in found), max(p["turns_with_answer"] for p in found)
    lines = [
        f"prompts tried on {found[0]['records']:,} records, {turns:,} turns, of which {answered:,} have an answer to"
        " compare with:",
        f"  {'prompt':<20}{'analysis':<10}{'right':<16}{'kept':<16}{'bare':<8}{'phi of kept':<20}tokens a turn",
    ]
    for number, prompt in enumerate(found):
        place = "" if number not in order else f"  <- {('first', 'second')[order.index(number)]}"
        lines.append(
            f"  {bounded(prompt['name']):<20}{'yes' if prompt['analysis'] else 'no':<10}"
            f"{_percent(prompt['right']):<16}{_percent(prompt['kept']):<16}"
            f"{_percent(prompt['bare'], error=False):<8}{_shown(prompt['phi'], '+.3f'):<20}"
            f"{_shown(prompt['tokens_per_turn'], '.0f')}{place}"
        )
    if not answered:
        lines.append(
            "no turn has an answer to compare with: kept is what --unverified and --verifier let by, and nothing says"
            " what is right"
        )
    if not any(_share(prompt).value > 0 for prompt in found):
        lines.append(
            f"WARNING: no prompt led to a response that is kept; going on with {bounded(found[order[0]]['name'])}:"
            " look at the texts before you spend hours on it"
        )
    return lines


def write_choice(
    folder: Path, found: Sequence[PromptNumbers], templates: Sequence[HintTemplate], job: Mapping[str, Any]
) -> None:
    """Make prompts.json, unless another launch was faster.

    Args:
        folder: the output.
        found: by prompt, in the order in which they were tried.
        templates: the prompts.
        job: what the choice was made for, see `read_choice`.
    """
    order = choose(found)
    content = {
        "format": FORMAT,
        "order": [found[i]["name"] for i in order],
        "chosen": [{"name": found[i]["name"], "sha256": found[i]["sha256"]} for i in order],
        "rule": "most turns kept; within one standard error of the best the highest phi;"
        " second: the best of the other kind, with or without analysis",
        "prompts": found,
        "texts": f"{TRIAL}/parts, one file for each prompt in the order above",
        "job": job,
        "sources": {template.sha256: template.source for template in templates},
    }
    write_atomically(folder / CHOICE, json.dumps(content, indent=1, ensure_ascii=False) + "\n", once=True)


def read_choice(folder: Path) -> dict[str, Any] | None:
    """What prompts.json says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / CHOICE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version knows {FORMAT}")
        chosen_templates(content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise InputError(f"{path} cannot be used ({error}): restore it, or name another output folder") from error
    return content


def chosen_templates(choice: Mapping[str, Any]) -> tuple[HintTemplate, ...]:
    """The prompts of `read_choice`, as they were tried, whatever the packaged ones say by now."""
    templates = tuple(HintTemplate(str(c["name"]), choice["sources"][c["sha256"]]) for c in choice["chosen"])
    if not templates or any(t.sha256 != c["sha256"] for t, c in zip(templates, choice["chosen"], strict=True)):
        raise ValueError("a prompt is not the one that its sha256 names")
    return templates


def _json(estimate: Estimate | None) -> EstimateNumbers | None:
    return None if estimate is None else estimate.as_json()


def _percent(numbers: EstimateNumbers | None, *, error: bool = True) -> str:
    return _shown(numbers, ".0%", error=error)


def _shown(numbers: EstimateNumbers | None, form: str, *, error: bool = True) -> str:
    if numbers is None:
        return "unknown"
    value, se = f"{numbers['value']:{form}}", numbers["se"]
    return value if se is None or not error else f"{value} ± {se:{form.removeprefix('+')}}"

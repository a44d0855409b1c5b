"""The report on a realigned corpus: one self-contained HTML page, and a JSON with the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_idft.corpus.report.html import render
from megatron_idft.corpus.report.numbers import save_report
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow, describe_methods
from megatron_idft.hinted_decoding.report import figures
from megatron_idft.hinted_decoding.report.outcome import ORIGINAL, STAGES
from megatron_idft.hinted_decoding.report.summary import Report, summarize
from megatron_idft.hinted_decoding.report.tallies import NameCount


def write_report(
    rows: Iterable[OutcomeRow],
    settings: Mapping[str, Any],
    output: Path,
    title: str,
    trial: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write report.html and report.json into a folder.

    Args:
        rows: read once as a stream; what is kept of them does not grow with their number.
        settings: of the job; all are shown, and "rollouts" decides whether the rollouts are the model's own samples.
        output: the folder.
        title: of the page.
        trial: what prompts.json says, see `prompt_trial.read_choice`.

    Returns:
        The paths of the two files.

    Raises:
        InputError: a row is none that `realign` can have written.
        UserError: matplotlib is not installed.
    """
    data = summarize(rows, settings, title, trial)
    return save_report(output, render_page(data), data)


def render_page(data: Report) -> str:
    """The HTML page. Needs matplotlib."""
    return render(
        "megatron_idft.hinted_decoding.report",
        "realign_report.html",
        data=data,
        describe_methods=describe_methods,
        figures=figures,
        flat_settings=flat_settings,
        rank_names=rank_names,
        turn_fates=turn_fates,
    )


def turn_fates(turns: Mapping[str, int]) -> dict[str, str]:
    """Fates of turns with their names on the page: every stage, and the other fates that occurred."""
    others = {"none": "without a stage", "dropped": "in dropped records", "error": "in failed records"}
    return {fate: fate for fate in (*STAGES, ORIGINAL)} | {fate: others[fate] for fate in others if turns[fate]}


def rank_names(lists: Iterable[list[NameCount]]) -> list[tuple[str, list[int]]]:
    """Every name of these counts with its count in each list; the most frequent name first."""
    columns = [Counter({entry["name"]: entry["count"] for entry in names}) for names in lists]
    total = sum(columns, Counter[str]())
    ranked = sorted(total, key=lambda name: (-total[name], name))
    return [(name, [column[name] for column in columns]) for name in ranked]


def flat_settings(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (a.b.c, value)."""
    if isinstance(settings, dict) and settings:
        items = settings.items()
        return [row for key, value in items for row in flat_settings(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(settings, list):
        settings = ", ".join(map(str, settings)) or "none"
    return [(prefix, "none" if settings is None or settings == {} else settings)] if prefix else []

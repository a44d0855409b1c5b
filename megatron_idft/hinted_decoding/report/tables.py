"""The report's tables as HTML."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_idft.corpus.display import source_name
from megatron_idft.corpus.report.findings import estimate
from megatron_idft.corpus.report.html_text import escaped, number, table
from megatron_idft.hinted_decoding.report.outcome import STAGES, STATUSES, VERDICTS

TABLE_SOURCES, SHOWN_NAMES = 50, 20
_TEXTS = {
    "original": "originals, all",
    "original_changed": "originals of rewritten turns (before)",
    "new": "new text (after)",
    "new_rollout": "… by rollouts",
    "new_hinted": "… by hinted decoding",
    "new_retry": "… by retries",
    "output": "the output, rewritten or not",
}
_PHI = ("mean φ", "spread φ", "below −1", "below −3", "below −5", "log p", "entropy")


def stage_tables(part: dict[str, Any]) -> str:
    """Two tables: candidates of each stage by what became of them, and shares of them."""
    columns = ("turns", "candidates", *VERDICTS, "not_compared", "leak", "unfinished", "accepted")
    heads = ["stage", "turns", "tried", *VERDICTS, "not compared", "leaks", "unfinished", "accepted"]
    rows = [[stage, *(_count(part["stages"][stage][column]) for column in columns)] for stage in STAGES]
    rows.append(["original", _count(part["turns"]["original"]), *["–"] * (len(columns) - 1)])
    text = table(heads, rows)
    shares = ("accuracy", "accuracy_of_decided", "turns_right_share", "accepted_share", "turns_accepted_share")
    heads = ["stage", "accuracy", "without unknown verdicts", "turns with a right candidate", "accepted of tried"]
    rows = [[stage, *(_share(part["stages"][stage][share]) for share in shares)] for stage in STAGES]
    return text + table([*heads, "turns kept"], rows)


def turn_table(part: dict[str, Any]) -> str:
    records, turns = part["records"], part["turns"]
    fates = ("rollout", "hinted", "retry", "original", "none", "dropped", "error")
    heads = ["", "total", "kept", "dropped", "error"]
    text = table(heads, [["records", *(_with_share(records, key) for key in ("total", "kept", "dropped", "error"))]])
    names = {"none": "without a stage", "dropped": "in dropped records", "error": "in failed records"}
    shown = [fate for fate in fates if turns[fate] or fate in (*STAGES, "original")]
    heads = ["", "total", *(names.get(fate, fate) for fate in shown)]
    return text + table(heads, [["turns", *(_with_share(turns, key) for key in ("total", *shown))]])


def names_table(title: str, lists: dict[str, list[dict[str, Any]]]) -> str:
    """Names with their counts, a column for each list; nothing where there are none."""
    counts = {head: {entry["name"]: entry["count"] for entry in names} for head, names in lists.items()}
    total: Counter[str] = Counter()
    for column in counts.values():
        total.update(column)
    ranked = sorted(total, key=lambda name: (-total[name], name))
    if not ranked:
        return ""
    rows = [
        [escaped(name), *(_count(column.get(name, 0)) for column in counts.values())] for name in ranked[:SHOWN_NAMES]
    ]
    more = f"<p>{len(ranked) - SHOWN_NAMES:,} more are in the JSON.</p>" if len(ranked) > SHOWN_NAMES else ""
    return table([title, *counts], rows) + more


def phi_table(data: dict[str, Any]) -> str:
    phi = data["corpus"]["phi"]
    rows = [_phi_row(name, phi[text]) for text, name in _TEXTS.items() if phi[text]["tokens"]]
    if phi["rollouts"]["tokens"]:
        own = data["null"]["own_samples"]
        rows.append(
            _phi_row("<i>all rollouts: own samples</i>" if own else "<i>all rollouts, tempered</i>", phi["rollouts"])
        )
    return table(["text", "records", "tokens", *_PHI], rows) if rows else ""


def paired_table(part: dict[str, Any]) -> str:
    paired = part["paired"]
    if not paired["turns"]:
        return ""
    row = ["after − before", _count(paired["records"]), _count(paired["turns"]), *_phi_cells(paired, sign=True)]
    text = "<h3>The same turns, before and after</h3>" + table(["", "records", "turns", *_PHI], [row])
    return text + (
        f"<p>{_share(paired['turns_risen'])} of these turns have a higher mean φ than before; they have"
        f" {estimate(paired['length_ratio'], 2)} times as many tokens.</p>"
        '<p class="soft">Per token, over the turns that were rewritten and scored on both sides; shares differ by'
        " percentage points. The standard errors are those of the paired difference, with each record as one draw.</p>"
    )


def lengths_table(part: dict[str, Any]) -> str:
    rows = []
    for text in ("original", "original_changed", "new", "output"):
        lengths = part["lengths"][text]
        if lengths["count"]:
            keys = ("p0", "p10", "p50", "p90", "p99", "p100")
            numbers = [f"{lengths['mean']:,.1f}", *(_count(lengths[key]) for key in keys)]
            rows.append([_TEXTS[text], _count(lengths["count"]), *numbers])
    heads = ["text", "turns", "mean", "min", "10 %", "median", "90 %", "99 %", "max"]
    return table(heads, rows) if rows else ""


def mixing_table(part: dict[str, Any]) -> str:
    mixing = part["mixing"]
    means = mixing["means"]
    heads = ["turns", "tokens from two streams", "of all their tokens", "mean λ", "λ = 0", "λ = 1"]
    heads += ["entropy, plain", "entropy, hinted", "mean φ"]
    if not mixing["tokens"]:
        return ""
    row = [_count(mixing["turns"]), _count(mixing["tokens"])]
    row += [f"{number(100 * mixing['tokens'] / mixing['tokens_of_response'], 1)} %", estimate(means["mix_weight"])]
    row += [_share(means["at_0"]), _share(means["at_1"]), estimate(means["entropy"])]
    return table(heads, [[*row, estimate(means["hinted_entropy"]), estimate(means["phi"], sign=True)]], text_columns=0)


def split_table(part: dict[str, Any]) -> str:
    rows = []
    for stage in ("hinted", "retry"):
        counts = part["stages"][stage]
        before, behind = (counts["splitter"][key] for key in ("tokens_before", "tokens_behind"))
        if counts["candidates"]:
            cells = [_count(lengths["p50"]) if lengths["count"] else "–" for lengths in (before, behind)]
            rows.append([stage, _count(before["count"]), _count(counts["splitter"]["never"]), *cells])
    heads = ["candidates", "with a splitter", "without", "median tokens before it", "median tokens behind it"]
    return "<h3>Where the hinted stream was dropped</h3>" + table(heads, rows) if rows else ""


def source_tables(data: dict[str, Any]) -> str:
    """What became of the records of each source, accuracy, phi, and how the streams were mixed."""
    if len(data["sources"]) < 2:
        return ""
    own = data["null"]["own_samples"]
    fates, accuracies, phi, mixing = [], [], [], []
    for part in data["sources"][:TABLE_SOURCES]:
        name, stages, paired = escaped(source_name(part["source"])), part["stages"], part["paired"]
        records = (_with_share(part["records"], key) for key in ("total", *STATUSES))
        fates.append([name, *records, *(_with_share(part["turns"], key) for key in (*STAGES, "original"))])
        shares = ("accuracy", "turns_accepted_share")
        accuracies.append([name, *(_share(stages[stage][share]) for share in shares for stage in STAGES)])
        before, after = part["phi"]["original_changed"], part["phi"]["new"]
        means = [before["phi_mean"], after["phi_mean"], paired["phi_mean"]]
        means += [part["phi"]["rollouts"]["phi_mean"]] * own
        limits = (_share(side[f"phi_below_{limit}"]) for limit in (3, 5) for side in (before, after))
        phi.append([name, _count(paired["turns"]), *(estimate(mean, sign=True) for mean in means), *limits])
        mixing.append([name, *_mixing_cells(part)])
    left_out = len(data["sources"]) - len(fates)
    heads = ["source", *(f"{what}: {stage}" for what in ("accuracy", "turns kept") for stage in STAGES)]
    text = table(["source", "records", *STATUSES, *(f"turns: {s}" for s in (*STAGES, "original"))], fates)
    text += table(heads, accuracies)
    heads = ["source", "turns rewritten", "φ before", "φ after", "paired difference", *["all rollouts"] * own]
    text += table([*heads, "below −3: before", "after", "below −5: before", "after"], phi)
    heads = ["source", "tokens after / before", "mean λ", "λ = 0", "λ = 1", "entropy, plain", "entropy, hinted"]
    text += table([*heads, "candidates with a splitter"], mixing)
    return text + (f"<p>{left_out:,} smaller sources are in the JSON.</p>" if left_out else "")


def _mixing_cells(part: dict[str, Any]) -> list[str]:
    means, splits = part["mixing"]["means"], [part["stages"][stage]["splitter"] for stage in ("hinted", "retry")]
    split = sum(splitter["tokens_before"]["count"] for splitter in splits)
    tried = split + sum(splitter["never"] for splitter in splits)
    weights = [estimate(means["mix_weight"]), _share(means["at_0"]), _share(means["at_1"])]
    entropies = [estimate(means["entropy"]), estimate(means["hinted_entropy"])]
    return [estimate(part["paired"]["length_ratio"], 2), *weights, *entropies, f"{_count(split)} of {_count(tried)}"]


def settings_table(settings: dict[str, Any]) -> str:
    rows = [[escaped(name), f'<span class="mono">{escaped(value)}</span>'] for name, value in _flat(settings)]
    return table(["setting", "value"], rows, text_columns=2) if rows else ""


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(settings, dict) and settings:
        return [row for key, value in settings.items() for row in _flat(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(settings, list):
        settings = ", ".join(map(str, settings)) or "none"
    return [(prefix, "none" if settings is None or settings == {} else settings)] if prefix else []


def _phi_row(name: str, numbers: dict[str, Any]) -> list[str]:
    return [name, _count(numbers["records"]), _count(numbers["tokens"]), *_phi_cells(numbers)]


def _phi_cells(numbers: dict[str, Any], *, sign: bool = False) -> list[str]:
    return [
        estimate(numbers["phi_mean"], sign=True),
        estimate(numbers["phi_std"], sign=sign),
        *(estimate(numbers[f"phi_below_{limit}"], 2, percent=True, sign=sign) for limit in (1, 3, 5)),
        estimate(numbers["log_prob_mean"], sign=sign),
        estimate(numbers["entropy_mean"], sign=sign),
    ]


def _with_share(counts: dict[str, int], key: str) -> str:
    if key == "total" or not counts["total"]:
        return _count(counts[key])
    share = number(100 * counts[key] / counts["total"], 1)
    return f'{_count(counts[key])} <span class="se">{share} %</span>'


def _share(value: dict[str, Any] | None) -> str:
    return estimate(value, 1, percent=True)


def _count(value: int) -> str:
    return f"{value:,}"

"""The linter's verdicts as HTML."""

from __future__ import annotations

import re
from typing import Any

from megatron_idft.corpus.display import bounded, source_name
from megatron_idft.corpus.lint.finding import LOOK, NOT_CHECKED, OK, PROBLEM
from megatron_idft.corpus.report.html_text import escaped, number

_BADGES = {
    PROBLEM: ("problem", "✖ problem"),
    LOOK: ("look", "▲ look"),
    OK: ("ok", "✓ ok"),
    NOT_CHECKED: ("unchecked", "– not checked"),
}


def render_findings(part: dict[str, Any]) -> str:
    """One corpus: a line for each finding that unfolds; problems are unfolded, what is in order is behind one line."""
    findings = part["findings"]
    counts = {verdict: sum(finding["verdict"] == verdict for finding in findings) for verdict in _BADGES}
    badges = "".join(_badge(verdict, f" {count}") for verdict, count in counts.items() if count)
    head = f"<h3>{escaped(part['name'])} <span class='soft'>· {escaped(part['model'])}</span> {badges}</h3>"
    if not findings:
        return head + "<p>No records, so nothing was checked.</p>"
    shown = [finding for verdict in (PROBLEM, LOOK) for finding in findings if finding["verdict"] == verdict]
    folded = [finding for finding in findings if finding["verdict"] in (OK, NOT_CHECKED)]
    if not shown and len(folded) == 1:
        return head + _finding(folded[0])
    text = head + "".join(_finding(finding) for finding in shown)
    if folded:
        names = ", ".join(escaped(finding["check"]) for finding in folded)
        inside = "".join(_finding(finding) for finding in folded)
        text += f'<details class="rest"><summary>Nothing found: {names}</summary>{inside}</details>'
    return text


def _finding(finding: dict[str, Any]) -> str:
    kind, _ = _BADGES[finding["verdict"]]
    opened = " open" if finding["verdict"] == PROBLEM else ""
    return (
        f'<details class="finding {kind}"{opened}><summary>{_badge(finding["verdict"])}'
        f"<b>{escaped(finding['check'])}:</b> {_prose(finding['result'])}</summary>"
        f"<p><b>What it means.</b> {_prose(finding['what_it_means'])}</p>"
        f"<p><b>What it does not prove.</b> {_prose(finding['what_it_does_not_prove'])}</p>"
        f'<p class="small"><b>Threshold.</b> {_prose(finding["threshold"])}. <b>Where it comes from.</b>'
        f" {_prose(finding['source_of_threshold'])}.</p>"
        f"{_evidence(finding['evidence'])}</details>"
    )


def _prose(text: str) -> str:
    """Signs and letters as on the rest of the page; the JSON and a console keep to ASCII."""
    text = re.sub(r"\bphi\b", "φ", escaped(text))
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _badge(verdict: str, more: str = "") -> str:
    kind, text = _BADGES[verdict]
    return f'<span class="badge {kind}">{text}{more}</span>'


def _evidence(evidence: dict[str, Any]) -> str:
    lines = []
    if evidence.get("examples"):
        lines.append("for example " + "; ".join(place(example) for example in evidence["examples"]))
    for group in evidence.get("largest", ()):
        places = "; ".join(place(example) for example in group["examples"])
        more = "; …" if group["records"] > len(group["examples"]) else ""
        lines.append(f"{group['records']:,} equal: {places}{more}")
    for source in evidence.get("foreign", ()):
        mean, std = (estimate(source[key], sign=key == "phi_mean") for key in ("phi_mean", "phi_std"))
        lines.append(
            f"<b>{escaped(source_name(source['source']))}</b>, {source['records']:,} records: mean {mean}, spread {std}"
            f" ({_prose('; '.join(source['reasons']))})"
        )
    if not lines:
        return ""
    return f'<p class="small"><b>Evidence.</b></p><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def place(record: dict[str, Any]) -> str:
    """Where a record stands: id, file and line."""
    name, file = bounded(record["id"]), bounded(record["file"])
    return f"<code>{escaped(name)}</code> <small>{escaped(file)}:{record['line']}</small>"


def estimate(value: dict[str, Any] | None, digits: int = 3, *, sign: bool = False, percent: bool = False) -> str:
    """A value with its standard error."""
    if value is None:
        return "–"
    scale, unit = (100, " %") if percent else (1, "")
    text = number(value["value"] * scale, digits, sign=sign) + unit
    if value["se"] is None:
        return text
    return f'{text} <span class="se">± {number(value["se"] * scale, digits)}</span>'

"""Records with their tokens coloured by phi, and the tables of worst tokens, as HTML."""

from __future__ import annotations

from typing import Any

from megatron_idft.corpus.display import source_name
from megatron_idft.corpus.report.findings import place
from megatron_idft.corpus.report.html_text import escaped, number, table, token_text

# Lower bound of phi, class, what the legend says. Orange and blue, which colour-blind readers can tell apart.
_LEVELS = (
    (1.0, "b2", "φ ≥ 1"),
    (0.3, "b1", "0.3 to 1"),
    (-0.3, "", "−0.3 to 0.3"),
    (-1.0, "a1", "−1 to −0.3"),
    (-3.0, "a2", "−3 to −1"),
    (-5.0, "a3", "−5 to −3"),
    (float("-inf"), "a4", "below −5"),
)


def legend() -> str:
    spans = "".join(f'<span class="{kind}">{text}</span>' for _, kind, text in reversed(_LEVELS))
    return f'<p class="legend">{spans}</p>'


def render_records(records: list[dict[str, Any]]) -> str:
    return "".join(_record(record) for record in records)


def _record(record: dict[str, Any]) -> str:
    facts = [
        f"mean φ <b>{number(record['phi_mean'], sign=True)}</b>",
        f"spread {number(record['phi_std'])}",
        f"log p {number(record['log_prob_mean'])}",
        f"{record['num_tokens']:,} tokens",
    ]
    if record["source"] is not None:
        facts.append(f"source {escaped(source_name(record['source']))}")
    if record["truncated"]:
        facts.append("truncated")
    if not record["ends_turn"]:
        facts.append("no end of turn")
    return f'<div class="record">{place(record)}<br>{" · ".join(facts)}{_text(record)}</div>'


def _text(record: dict[str, Any]) -> str:
    if not record["excerpts"]:
        note = '<p class="soft"><small>The scores per token were not kept; these are its worst tokens.</small></p>'
        return note + worst_table(record["worst_tokens"], places=False) if record["worst_tokens"] else ""
    parts, end = [], 0
    for excerpt in record["excerpts"]:
        if excerpt["start"] > end:
            parts.append(f'\n<i class="gap">… {excerpt["start"] - end:,} tokens …</i>\n')
        parts += [_token(*token) for token in excerpt["tokens"]]
        end = excerpt["start"] + len(excerpt["tokens"])
    if end < record["num_tokens"]:
        parts.append(f'\n<i class="gap">… {record["num_tokens"] - end:,} more tokens</i>')
    return f'<div class="text">{"".join(parts)}</div>'


def _token(text: str, phi: float, log_prob: float, entropy: float) -> str:
    kind = next(kind for low, kind, _ in _LEVELS if phi >= low)
    title = f"φ {number(phi, 2, sign=True)} · log p {number(log_prob, 2)} · entropy {number(entropy, 2)}"
    css = f' class="{kind}"' if kind else ""
    return f'<span{css} title="{title}">{token_text(text)}</span>'


def worst_table(tokens: list[dict[str, Any]], *, places: bool = True) -> str:
    heads = ["token", "after", *(["record"] if places else []), "φ", "log p", "entropy"]
    rows = []
    for token in tokens:
        numbers = [number(token["phi"], 2, sign=True), number(token["log_prob"], 2), number(token["entropy"], 2)]
        text = _named(token)
        where = [f"{place(token)} <small>position {token['position']:,}</small>"] if places else []
        rows.append([text, f'<span class="mono">{escaped("…" + token["context"])}</span>', *where, *numbers])
    return table(heads, rows, text_columns=3 if places else 2)


def recurring_table(tokens: list[dict[str, Any]]) -> str:
    rows = [
        [
            _named(token),
            f"{token['times']:,}",
            number(token["phi_mean"], 2, sign=True),
        ]
        for token in tokens
    ]
    return table(["token", "times among a record's worst", "mean φ there"], rows)


def _named(token: dict[str, Any]) -> str:
    text = token_text(token["token"], blanks=True)
    return f'<span class="mono"><b>{text}</b></span> <small>{token["token_id"]}</small>'

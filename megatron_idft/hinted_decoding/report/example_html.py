"""Examples side by side: the original text, and the new one with its tokens coloured by lambda."""

from __future__ import annotations

from typing import Any

from megatron_idft.corpus.display import source_name
from megatron_idft.corpus.report.findings import place
from megatron_idft.corpus.report.html_text import escaped, number, token_text

# Lower bound of lambda, class, what the legend says: orange follows the hint, blue the model's own stream.
_LEVELS = (
    (0.9, "b2", "0.9 to 1"),
    (0.6, "b1", "0.6 to 0.9"),
    (0.4, "", "0.4 to 0.6"),
    (0.1, "a1", "0.1 to 0.4"),
    (float("-inf"), "a2", "λ below 0.1: follows the hint"),
)
_KINDS = (
    ("largest", "Largest gain in mean φ"),
    ("smallest", "Smallest gain in mean φ"),
    ("drawn", "Drawn by a hash of the record’s id, whatever their φ"),
)
EXAMPLE_STYLE = """
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; }
.pair h4 { margin: 8px 0 0; font-size: 13px; color: var(--soft); font-weight: 600; }
.text .one, .legend .one { color: #5c636b; text-decoration: underline dotted #9aa1a8; }
@media (max-width: 800px) { .pair { grid-template-columns: minmax(0, 1fr); } }
"""


def render_examples(examples: dict[str, list[dict[str, Any]]]) -> str:
    bodies = []
    for kind, title in _KINDS:
        if examples[kind]:
            opened = " open" if kind == "largest" else ""
            inside = "".join(map(_example, examples[kind]))
            summary = f"<summary>{title}: {len(examples[kind])} turns</summary>"
            bodies.append(f"<details{opened}>{summary}{inside}</details>")
    return _legend() + "".join(bodies) if bodies else ""


def _legend() -> str:
    spans = "".join(f'<span class="{kind}">{text}</span>' for _, kind, text in reversed(_LEVELS))
    return f'<p class="legend">{spans}<span class="one">one stream: the model alone</span></p>'


def _example(example: dict[str, Any]) -> str:
    facts = [
        f"mean φ {number(example['phi_before'], sign=True)} → <b>{number(example['phi_after'], sign=True)}</b>",
        f"gain {number(example['gain'], sign=True)}",
        f"{example['tokens_before']:,} → {example['tokens_after']:,} tokens",
        f"stage {escaped(example['stage'])}",
    ]
    for key, name in (("beta", "β"), ("verdict", "verdict"), ("finish_reason", "ended by"), ("split_at", "split at")):
        if example[key] is not None:
            facts.append(f"{name} {escaped(example[key])}")
    if example["extracted"] is not None:
        facts.append(f"answer <code>{escaped(example['extracted'])}</code>")
    if example["source"] is not None:
        facts.append(f"source {escaped(source_name(example['source']))}")
    return (
        f'<div class="record">{place(example)} <small>message {escaped(example["message"])}</small><br>'
        f'{" · ".join(facts)}<div class="pair"><div><h4>original</h4>{_original(example["original"])}</div>'
        f"<div><h4>new</h4>{_new(example)}</div></div></div>"
    )


def _original(original: dict[str, Any]) -> str:
    text = _lines(original["head"])
    if original["left_out"]:
        text += f'\n<i class="gap">… {original["left_out"]:,} characters …</i>\n{_lines(original["tail"])}'
    return f'<div class="text">{text}</div>'


def _lines(text: str) -> str:
    return token_text(text) if text else '<i class="gap">no text</i>'


def _new(example: dict[str, Any]) -> str:
    if not example["excerpts"]:
        return f'<div class="text">{_lines(example["text"])}</div>'
    parts, end = [], 0
    for excerpt in example["excerpts"]:
        if excerpt["start"] > end:
            parts.append(f'\n<i class="gap">… {excerpt["start"] - end:,} tokens …</i>\n')
        parts += [_token(*token) for token in excerpt["tokens"]]
        end = excerpt["start"] + len(excerpt["tokens"])
    return f'<div class="text">{"".join(parts)}</div>'


def _token(text: str, weight: float, phi: float, entropy: float, hinted_entropy: float | None) -> str:
    title = f"φ {number(phi, 2, sign=True)} · entropy {number(entropy, 2)}"
    if hinted_entropy is None:
        kind, title = "one", f"one stream · {title}"
    else:
        kind = next(kind for low, kind, _ in _LEVELS if weight >= low)
        title = f"λ {number(weight, 2)} · {title} · hinted {number(hinted_entropy, 2)}"
    css = f' class="{kind}"' if kind else ""
    return f'<span{css} title="{title}">{token_text(text)}</span>'

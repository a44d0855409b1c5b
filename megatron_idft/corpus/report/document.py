"""The frame of a page: its head, its sections and the links to them; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_idft.corpus.report.html_text import escaped
from megatron_idft.corpus.report.style import STYLE


def document(title: str, lead: str, sections: Sequence[tuple[str, str, str]], style: str = "") -> str:
    """The whole document.

    title: text. lead: HTML under it. sections: anchor, title and HTML of each; empty ones are left out. style: what
    this page needs beyond the common style.
    """
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    bodies = "".join(f'<section id="{anchor}"><h2>{name}</h2>{body}</section>' for anchor, name, body in sections)
    title = escaped(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own, or a browser that shows the page from a server would ask for one.
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}{style}</style></head><body><main>'
        f'<h1>{title}</h1><p class="soft">{lead}</p><nav>{nav}</nav>{bodies}</main></body></html>\n'
    )


def image(uri: str, alternative: str) -> str:
    """A figure; nothing where there is none."""
    return f'<img src="{uri}" alt="{alternative}">' if uri else ""

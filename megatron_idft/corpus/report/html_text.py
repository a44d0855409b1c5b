"""Text of any origin in HTML: nothing in it becomes markup, and what cannot be seen is made visible."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

_MARKS = {"\n": "↵", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # parts of words in some scripts, and of emoji


def visible(text: str) -> str:
    """Line ends and tabs as ↵ and ⇥; what else a page would hide or obey (control, direction marks) as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def escaped(text: object) -> str:
    """For element content and quoted attributes."""
    return html.escape(visible(str(text)))


def token_text(text: str, *, blanks: bool = False) -> str:
    """A token for element content in `white-space: pre-wrap`: line ends and tabs are marked, as are lone blanks.

    blanks: mark all blanks, where a token stands alone.
    """
    if blanks or not text.strip(" "):
        return escaped(text).replace(" ", "␣") or "∅"
    return escaped(text).replace("↵", "↵\n")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table of cells that are HTML already; the first `text_columns` are text, the rest numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ("" if column < text_columns else ' class="num"' for column in range(len(row)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """With a true minus sign, and without a negative zero."""
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _visible(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    code = ord(character)
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE
    if not hidden or character in _JOINERS:
        return character
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

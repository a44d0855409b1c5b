"""How a page is made: Jinja2 templates in which text of any origin stays text, and every character can be seen."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_idft.corpus.scores.display import bounded, source_name

_MARKS = {"\n": "↵", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # parts of words in some scripts, and of emoji


def render(package: str, template: str, **values: Any) -> str:
    """The whole document, which holds no script and loads nothing.

    Args:
        package: whose folder `templates` holds the template; base.html, macros.html and style.css stand in this one's.
        template: file name of a template that extends base.html.
        values: what the template reads.
    """
    return environment(package).get_template(template).render(values)


@functools.cache
def environment(package: str) -> Environment:
    """The environment of the templates of `package`, with those that reports share, and the filters below."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("megatron_idft.corpus.report")]),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (bounded, commas, level, number, prose, source_name, token):
        made.filters[function.__name__] = function
    return made


def _finalize(value: object) -> object:
    """Every expression of a template passes here before it is escaped. Only templates make Markup."""
    return value if isinstance(value, Markup) else visible(str(value))


def visible(text: str) -> str:
    """Line ends and tabs as ↵ and ⇥; what else a page would hide or obey (control, direction marks) as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    code = ord(character)
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE
    if not hidden or character in _JOINERS:
        return character
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def token(text: str, blanks: bool = False) -> Markup:
    """A token for `white-space: pre-wrap`: line ends and tabs are marked, as are lone blanks.

    Args:
        text: of the token.
        blanks: mark all blanks, for a token in a place of its own.
    """
    if blanks or not text.strip(" "):
        return escape(visible(text).replace(" ", "␣") or "∅")
    return escape(visible(text).replace("↵", "↵\n"))


def prose(text: str) -> str:
    """Signs and letters as on the rest of the page; the JSON and a console keep to ASCII."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", re.sub(r"\bphi\b", "φ", text))


def commas(count: int) -> str:
    """1,234,567."""
    return f"{count:,}"


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """With a true minus sign, and without a negative zero."""
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def level(value: float, levels: Sequence[tuple[float | None, str, str]]) -> str:
    """The class of the first level whose lower bound `value` reaches; the last level has none.

    Args:
        value: the number.
        levels: lower bound, class and meaning of each, the highest first.
    """
    return next(name for low, name, _ in levels if low is None or value >= low)

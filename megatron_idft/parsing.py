"""Parsers whose errors are one line with the nearest flag, instead of a usage of hundreds of lines."""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_idft.errors import ArgumentError

OF_EVERY_VERB = "--verbose shows what Megatron, torch and other libraries print, and tracebacks, on the console."
_UNRECOGNIZED = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """argparse's, which raises instead of printing its usage and leaving.

    Raises:
        ArgumentError: from `parse_args`.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **{"epilog": OF_EVERY_VERB} | options)

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def raise_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser that somebody else has built behave like `Parser`, and its --help printable."""
    parser.error = functools.partial(refuse, parser)  # type: ignore[method-assign]
    for action in parser._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            action.help = _printable(action)
    return parser


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raise argparse's `message` as an ArgumentError, with the flag that a misspelt one may have meant."""
    if not message.startswith(_UNRECOGNIZED):
        raise ArgumentError(message)
    words = message.removeprefix(_UNRECOGNIZED).split()
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        raise ArgumentError(f"{_clip(' '.join(words))}: no flag takes these words. Quote values that hold spaces")
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    known = [option for action in shown for option in action.option_strings]
    raise ArgumentError("; ".join(_unknown(flag, known) for flag in flags))


def _unknown(flag: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.7)
    return f"{_clip(flag)} is not a flag" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _clip(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"


def _printable(action: argparse.Action) -> str:
    """The help text; without a percent sign that argparse would fill in and cannot (Megatron 0.19 has one)."""
    assert action.help is not None
    try:
        action.help % (vars(action) | {"prog": ""})
    except (KeyError, TypeError, ValueError):
        return action.help.replace("%", "%%")
    return action.help

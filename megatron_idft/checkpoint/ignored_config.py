"""`--ignore-config FIELD …`, and what a program tells of the fields of config.json that are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_idft.checkpoint.config_fields import FLAG
from megatron_idft.checkpoint.config_values import shown_name
from megatron_idft.parsing import Parser

_SHOWN = 8  # names in one line


def add_ignore_config(group: Any) -> None:
    """Add `--ignore-config` to a parser or an argument group."""
    group.add_argument(
        FLAG,
        nargs="+",
        action="extend",
        metavar="FIELD",
        default=None,
        help="Fields of the model's config.json that would be refused and do not change what the model computes: you"
        " take responsibility. Exported folders keep them. A field that the model depends on cannot be ignored.",
    )


def named_to_ignore(words: Sequence[str]) -> tuple[str, ...]:
    """The names given to `--ignore-config` on a command line with any other flags.

    Raises:
        ArgumentError: the flag without a name.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    add_ignore_config(parser)
    return tuple(parser.parse_known_args(list(words))[0].ignore_config or ())


def ignored_lines(where: str, ignored: Sequence[str], by_user: Sequence[str]) -> list[str]:
    """What to tell of the fields that are ignored, a line for each kind; none if there are no such fields."""
    kinds = (
        (ignored, "ignored, without a part in what the model computes"),
        (by_user, f"ignored by {FLAG}"),
    )
    return [f"{where}: {why}: {_few(names)}" for names, why in kinds if names]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown_name, names[:_SHOWN])) + more

"""Validation sets by name, from the words of a command line."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_idft.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def named_sets(words: Sequence[str]) -> dict[str, list[str]]:
    """`[NAME=]FILE …` -> the files of each set, in the order in which the sets come up.

    Words without a name are one set, named "". A word that is itself a file, or a prefix of packs, is taken as such
    whatever it contains.

    Raises:
        InputError: a name that could not stand in a metric's key, or one without a file.
    """
    sets: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name or Path(word).exists() or Path(word + ".json").is_file():
            name, path = "", word
        elif not path:
            raise InputError(f"--sft-valid-data {word}: no file behind the name. Write NAME=FILE")
        elif not _NAME.fullmatch(name):
            raise InputError(
                f"--sft-valid-data {word}: {name!r} is no name. Use letters, digits, '-', '_' and '.', such as math"
            )
        sets.setdefault(name, []).append(path)
    return sets

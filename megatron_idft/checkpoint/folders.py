"""Folders that appear only when they are complete, and the small files that travel with the weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_idft.errors import ConversionError
from megatron_idft.files import building_in
from megatron_idft.links import refuse_links_out

COMPANIONS = "tokenizer"  # the folder of config.json and the tokenizer's files, inside a Megatron checkpoint
# Small files of a Hugging Face folder that travel with the weights. No Python: nothing here ever runs a model's code.
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to it at the end, and removed after an error.

    What killed conversions left beside `target` is removed too.

    Raises:
        ConversionError: `target` exists, unless it is to be replaced.
    """
    if target.exists() and not replace:
        raise ConversionError(f"{target} exists already: nothing is overwritten. Remove it, or name another folder")
    with building_in(target.parent) as building:
        yield building
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        building.rename(target)


def copy_companions(source: Path, target: Path) -> None:
    """Copy config.json and the tokenizer's files, no weights and no code, into `target`.

    Raises:
        InputError: one of them is a link out of `source`. Nothing is copied then.
    """
    found = [path for pattern in _COMPANION_FILES for path in sorted(source.glob(pattern))]
    refuse_links_out(source, [*found, *source.glob("additional_chat_templates/**/*")])
    target.mkdir(exist_ok=True)
    for path in found:
        if path.is_dir():
            if path.name == "additional_chat_templates":
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def find_companions(source: Path, folder: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    for place in (source / COMPANIONS, folder.parent / COMPANIONS):
        if (place / "config.json").is_file():
            return place
    raise ConversionError(
        f"{source} says nothing about the Hugging Face model it is to become: pass --hf-config with the Hugging Face"
        " folder that it was converted from (its config.json and tokenizer are copied, its weights are not read)"
    )

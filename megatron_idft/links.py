"""Symbolic links in folders that other people made."""

from collections.abc import Iterable
from pathlib import Path

from megatron_idft.errors import InputError


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path`, followed to its end, lies outside of a model's folder.

    Hugging Face's hub cache holds `snapshots/REVISION/FILE -> ../../blobs/HASH`: the blobs of the same model count as
    part of its folder.
    """
    root = folder.resolve()
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    target = path.resolve()
    return not any(target.is_relative_to(place) for place in places)


def refuse_links_out(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links in a model's folder that lead out of it.

    Raises:
        InputError: at the first of `paths` that is a link to somewhere else or to nothing.
    """
    for path in paths:
        if leads_out(folder, path):
            raise InputError(
                f"{path} is a symbolic link out of its folder, to {path.resolve()}: it is not followed. If that is the"
                " right file, put a copy of it in the place of the link"
            )
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is a symbolic link to {path.resolve()}, which is not there: was the download interrupted?"
                " Download the folder again"
            )

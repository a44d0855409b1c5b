"""Hugging Face folders converted once: `hf-<fingerprint>` folders in a cache, each one for Megatron's --load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.model_flags import ModelClass
from megatron_idft.errors import ConversionError
from megatron_idft.files import describe_source
from megatron_idft.links import leads_out

FORMAT = 2  # raise it whenever the same folder would give another checkpoint


def cached_checkpoint(
    source: Path, cache_dir: Path, model_class: ModelClass, ignored_by_user: Sequence[str] = ()
) -> Path:
    """Where the converted `source` lies, or will. Reads the head and tail of its files, never all of them.

    The fingerprint covers the folder's config.json, weights and tokenizer by name, size, modification time and the
    hash of head and tail; a folder that is merely touched is converted again.

    Args:
        source: the Hugging Face folder.
        cache_dir: of all converted models.
        model_class: that it is converted for.
        ignored_by_user: fields of config.json without which it would be another model, or none; part of the
            fingerprint.

    Raises:
        ConversionError: `source` is not a Hugging Face folder.
    """
    if not (source / "config.json").is_file():
        raise ConversionError(f"{source} is not a Hugging Face model folder: it has no config.json")
    # A link that leaves the folder is not read: where the file is needed, the conversion refuses it by name.
    files = sorted(
        path
        for path in source.iterdir()
        if path.is_file() and not path.name.startswith(".") and not leads_out(source, path)
    )
    described: dict[str, Any] = {"format": FORMAT, "model_class": model_class}
    described["files"] = [describe_source(path) for path in files]
    if ignored_by_user:  # without, the fingerprint is that of earlier versions
        described["ignored_by_user"] = sorted(ignored_by_user)
    return cache_dir / f"hf-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]}"


def build_cached_checkpoint(
    source: Path, target: Path, model_class: ModelClass, progress: bool, ignore: Sequence[str] = ()
) -> None:
    """Convert `source` into `target`, the answer of `cached_checkpoint`, unless it is there. Launches may race."""
    from megatron_idft.checkpoint.convert import to_megatron  # noqa: PLC0415  imports torch

    if target.exists():
        return
    try:
        to_megatron(source, target, model_class, progress, ignore)
    except PermissionError as error:
        raise ConversionError(f"the converted model cannot be kept ({error}): pass --hf-cache DIR") from error
    except (ConversionError, OSError):
        if not target.exists():  # where it does, another launch was faster, before the new folder was begun or after
            raise

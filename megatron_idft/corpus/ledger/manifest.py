"""The job of a ledger's folder: settings that every launch must share."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_idft.errors import ABSENT, LedgerError, SettingsMismatch
from megatron_idft.files import put, sync, synced_file

FORMAT = 1  # raise it whenever older launches could not share a folder with newer ones
_PACKAGES = ("megatron-idft", "megatron-core", "torch", "transformers", "numpy", "pyarrow")  # for information only


def agree(
    folder: Path,
    unfinished: Path,
    token: str,
    job: dict[str, Any],
    current: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Record the job in the folder, or compare it with the one that is recorded there. Atomic: one launch records.

    Args:
        folder: of the job.
        unfinished: where to write a temporary file.
        token: this launch's own.
        job: what to record or compare.
        current: applied to the recorded settings.

    Raises:
        SettingsMismatch: the recorded job is another one.
        LedgerError, OSError: the folder cannot be used.
    """
    manifest, parts = folder / "manifest.json", folder / "parts"
    job = {"format": FORMAT} | json.loads(json.dumps(job))  # tuples become the lists that are read back
    if not manifest.exists():
        has_parts = parts.is_dir() and any(parts.iterdir())
        if has_parts and manifest.name not in os.listdir(folder):  # looked up last: it comes before any part
            raise LedgerError(f"{folder} holds parts but no manifest.json: name another output folder")
        temporary = unfinished / f"manifest.{token}.json"
        try:
            with synced_file(temporary) as file:
                json.dump(job | {"versions": _versions()}, file, indent=1, ensure_ascii=False)
            put(temporary, manifest)
        except FileNotFoundError:  # cleared away by a launch that was faster
            if not manifest.exists():
                raise
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder)
    there = read_manifest(folder)
    found = dict(differences(current(there["settings"]), job["settings"]))
    # The format first: a manifest of another one may mean anything.
    for key in ("part_suffix", "num_chunks", "format"):
        if there[key] != job[key]:
            found = {key: (there[key], job[key])} | found
    if found:
        raise SettingsMismatch(folder, found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`format`, `num_chunks`, `part_suffix`, `settings` and `versions` of the job.

    Raises:
        LedgerError: it is no job's folder.
        OSError: it cannot be read.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise LedgerError(f"{folder} holds no manifest.json: it is not the output folder of a job")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["settings"], dict) or not manifest.keys() >= {"format", "num_chunks", "part_suffix"}:
            raise TypeError("not what a ledger writes")
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} is damaged ({error}): restore it, or name another output folder") from error
    return manifest


def differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(key, (old, new)) of everything that differs between two settings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{at}.{key}" if at else key)
    # Compared as text: NaN equals itself, and true is not 1.
    elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
        yield at, (old, new)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions

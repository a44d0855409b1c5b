"""Rows of a realigned corpus, read back from its folder: in input order, with retries in the place of errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.corpus.ledger.manifest import read_manifest
from megatron_idft.errors import InputError
from megatron_idft.files import write_atomically
from megatron_idft.hinted_decoding.output.former_names import current_row, current_settings
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.prompts import HintTemplate

TRIAL = "prompt_trial"  # the ledger of a trial of prompts, a chunk for each
RETRIES = "retries"  # its folders 001, 002, … are ledgers of their own, for records that were errors before
_INDICES = "indices.json"
_NUMBER = re.compile(r"\d{3,}")


def read_outcomes(folder: Path, columns: Sequence[str] | None = None) -> Iterator[OutcomeRow]:
    """Rows of a finished or unfinished folder. A retried record has its latest row that is no error.

    A folder that an earlier version wrote lacks the columns that it did not know; those that it named otherwise come
    under today's names.

    Args:
        folder: the output folder of a job.
        columns: the columns to read, `index` and `status` among them; None: all.

    Raises:
        InputError: nothing is realigned yet.
        LedgerError: the folder is no job's.
    """
    parts = sorted((folder / "parts").glob("chunk-*.parquet"))
    if not parts:
        raise InputError(f"{folder}: no realigned records there; it should be the --output folder of `realign`")
    retried = {
        row["index"]: row
        for retry in retry_folders(folder)
        for row in _rows(retry, columns)
        if row["status"] != "error"
    }
    for part in parts:
        for row in _read(part, columns):
            yield retried.get(row["index"], row) if row["status"] == "error" else row


def retry_folders(folder: Path) -> list[Path]:
    """The ledgers of retries, the oldest first."""
    place = folder / RETRIES
    if not place.is_dir():
        return []
    found = [path for path in place.iterdir() if _NUMBER.fullmatch(path.name) and (path / "manifest.json").exists()]
    return sorted(found, key=lambda path: int(path.name))


def open_retry(folder: Path) -> tuple[Path, list[int]] | None:
    """The ledger in which errors are tried again, and the indices of its records; None where there is no error left.

    A retry that was begun and is not finished is continued. Launches that open one at the same time get the same.

    Raises:
        InputError: the folder itself is not finished.
    """
    state = status_of(folder)
    if state.finished < state.num_chunks:
        raise InputError(
            f"{folder}: {state.num_chunks - state.finished} chunks are not finished; errors are tried again when all"
            " others are done: run the same command without --retry-errors first"
        )
    begun = retry_folders(folder)
    if begun:
        last = status_of(begun[-1])
        if last.finished < last.num_chunks:
            return begun[-1], json.loads((begun[-1] / _INDICES).read_text())
    errors = [row["index"] for row in read_outcomes(folder, ["index", "status"]) if row["status"] == "error"]
    if not errors:
        return None
    retry = folder / RETRIES / f"{1 + (int(begun[-1].name) if begun else 0):03d}"
    retry.mkdir(parents=True, exist_ok=True)
    write_atomically(retry / _INDICES, json.dumps(errors), once=True)
    return retry, json.loads((retry / _INDICES).read_text())


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the job was begun with, under today's names."""
    return current_settings(read_manifest(folder)["settings"])


def recorded_prompts(folder: Path, known: Sequence[HintTemplate]) -> tuple[HintTemplate, ...] | None:
    """The prompts that a folder was begun with where no trial chose them; None where the folder is not begun.

    Args:
        folder: the output folder of a job.
        known: prompts, among which they are looked for.

    Raises:
        InputError: one of them is not known.
    """
    if not (folder / "manifest.json").exists():
        return None
    by_hash = {template.sha256: template for template in known}
    recorded = [prompt["sha256"] for prompt in read_settings(folder)["prompts"]]
    for sha256 in recorded:
        if sha256 not in by_hash:
            raise InputError(
                f"{folder} was begun with a prompt of the user's, sha256 {sha256[:12]}…: pass its file as --hint-prompt"
            )
    return tuple(by_hash[sha256] for sha256 in recorded)


def begun_by_earlier_version(folder: Path) -> dict[str, Any] | None:
    """The settings of a job that was begun before bare responses were rejected; None for any other folder."""
    if not (folder / "manifest.json").exists():
        return None
    settings = read_manifest(folder)["settings"]
    return current_settings(settings) if not {"bare_below", "regenerate"} & settings.keys() else None


def _rows(folder: Path, columns: Sequence[str] | None) -> Iterator[OutcomeRow]:
    for part in sorted((folder / "parts").glob("chunk-*.parquet")):
        yield from _read(part, columns)


def _read(part: Path, columns: Sequence[str] | None) -> Iterator[OutcomeRow]:
    with pq.ParquetFile(part) as file:
        former = file.schema_arrow.field("turns").type.value_type.get_field_index("hints") < 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            rows = batch.to_pylist()
            yield from cast(list[OutcomeRow], [current_row(row) for row in rows] if former else rows)

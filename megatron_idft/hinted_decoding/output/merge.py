"""The kept records of a realigned corpus in one file, ready to train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.copying import open_lines, suffix_of
from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.errors import InputError
from megatron_idft.files import complete_file
from megatron_idft.hinted_decoding.output.outcomes import METHOD_COLUMNS, count_methods
from megatron_idft.hinted_decoding.output.results import read_outcomes

_ROWS = 512  # of a Parquet row group


class Merged(TypedDict):
    """Numbers of records, and of the kept turns by the rule that found them right, see `count_methods`."""

    kept: int
    dropped: int
    error: int
    kept_turns: dict[str, int]


def merge(folder: Path, output: Path, *, partial: bool = False) -> Merged:
    """Write the kept records in the order of the input; the file appears whole or not at all.

    Args:
        folder: the output folder of a job.
        output: a new .jsonl, .jsonl.gz, .jsonl.zst or .parquet.
        partial: also where chunks are missing.

    Raises:
        InputError: the output exists or has another suffix, the folder is not finished, or no Parquet type fits a
            column.
    """
    suffix = suffix_of(output)
    state = status_of(folder)
    if state.finished < state.num_chunks and not partial:
        raise InputError(
            f"{folder}: {state.num_chunks - state.finished} of {state.num_chunks} chunks are not finished; finish them"
            " by the same command, or pass --partial to merge those that are"
        )
    counts, methods = Counter[str](), Counter[str]()
    output.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(output) as building:
        if suffix == ".parquet":
            _write_parquet(building, folder, counts, methods)
        else:
            with open_lines(building, suffix) as file:
                for record in _kept(folder, counts, methods):
                    file.write(record.encode("utf-8", "surrogatepass") + b"\n")
    return {
        "kept": counts["kept"],
        "dropped": counts["dropped"],
        "error": counts["error"],
        "kept_turns": dict(methods),
    }


def _kept(folder: Path, counts: Counter[str], methods: Counter[str]) -> Iterator[str]:
    for row in read_outcomes(folder, ["index", "status", "record", *METHOD_COLUMNS]):
        counts[row["status"]] += 1
        if row["status"] == "kept":
            assert row["record"] is not None
            methods.update(count_methods(row["turns"]))
            yield row["record"]


def _write_parquet(path: Path, folder: Path, counts: Counter[str], methods: Counter[str]) -> None:
    """Two passes: a column's type may show late, where it is empty at first."""
    schema: pa.Schema | None = None
    try:
        for batch in batched(_kept(folder, Counter(), Counter()), _ROWS):
            # As structs: a table's columns would be named after the keys of only its first row.
            found = pa.schema(pa.array([_storable(json.loads(record)) for record in batch]).type)
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
        if schema is None:
            raise InputError(f"{folder}: no record was kept, so there is no Parquet schema; merge to .jsonl")
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in batched(_kept(folder, counts, methods), _ROWS):
                rows = [_storable(json.loads(record)) for record in batch]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{folder}: the records do not fit one Parquet schema ({error}); merge to .jsonl") from error


def _storable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without empty objects, which Parquet cannot hold."""
    return {key: value for key, value in record.items() if value != {}}

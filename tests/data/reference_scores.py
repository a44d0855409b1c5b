"""Scores as `score` and other engines write them, of a reference model that is a formula."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.scores.rows import TOKEN_SCHEMA, scored_record
from tests.data.prepared_files import tokenized

TOP_K = 5


def log_prob(ids, positions):
    """Of a token by its id and its position, float32: no two of a corpus are likely to be the same."""
    return -((ids.astype(np.float64) * 31 + positions * 17) % 997 / 50 + 1e-3).astype(np.float32)


def entropy(ids, positions):
    return (positions * 0.01 + ids % 7).astype(np.float32)


def tops(ids, positions):
    """Ids and log q [m, TOP_K]; the token itself is no special one of them."""
    steps = np.arange(TOP_K)
    return (ids[:, None] + steps).astype(np.int32), (-2.5 - steps - positions[:, None] * 0.01).astype(np.float32)


def write_scores(folder, tokenizer, *paths, seq_length=128, chunk_records=7, recorded=None, finished=True, **options):
    """The folder of a `score` over these files, as `integration/offline/score.py` writes it."""
    records = tokenized(tokenizer, folder.with_name(folder.name + "-cache"), *paths, seq_length=seq_length, **options)
    chunks = -(-len(records) // chunk_records)
    settings = {
        "model": "/models/base",
        "hf_model": "Base-8B",
        "iteration": 0,
        "tokens": records.path.name,
        "tokenizer": tokenizer.fingerprint(),
        "seq_length": seq_length,
        "last_turn_only": False,
        "checkpoint": "c0ffee",
    }
    with Ledger(folder, settings | (recorded or {}), chunks) as ledger:
        while (chunk := ledger.claim()) is not None and (finished or chunk):
            indices = range(chunk * chunk_records, min((chunk + 1) * chunk_records, len(records)))
            rows = [
                row(records, index, origin) for index, origin in zip(indices, records.records(indices), strict=True)
            ]
            ledger.finish(chunk, lambda path, rows=rows: pq.write_table(pa.Table.from_pylist(rows, TOKEN_SCHEMA), path))
    return folder


def row(records, index, origin):
    ids, mask = records[index]
    positions = np.arange(1, len(ids))
    values = log_prob(ids[1:], positions), entropy(ids[1:], positions)
    nothing = {"decode": lambda tokens: "", "end_of_turn_ids": [], "special_ids": []}
    return {"index": index, **origin, **scored_record(ids, mask, *values, **nothing)}


def foreign_rows(scores):
    """The same scores as another engine would write them: records by file and line, and the K of each token."""
    found = []
    for part in sorted((scores / "parts").glob("*.parquet")):
        for one in pq.read_table(part).to_pylist():
            kept = {key: one[key] for key in ("file", "line", "positions", "token_ids", "log_prob", "entropy")}
            ids, logs = tops(np.array(one["token_ids"]), np.array(one["positions"]))
            found.append(kept | {"top_token_ids": ids.ravel().tolist(), "top_log_prob": logs.ravel().tolist()})
    return found


def write_lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path

"""Files of scores, some hundreds of records each: those of `score`, and those that a foreign file is cut into."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.rows import ScoreRow

LISTS = {
    "positions": pa.list_(pa.int32()),
    "token_ids": pa.list_(pa.int32()),
    "log_prob": pa.list_(pa.float32()),
    "entropy": pa.list_(pa.float32()),
    "top_token_ids": pa.list_(pa.int32()),  # the K of each token, one after the other
    "top_log_prob": pa.list_(pa.float32()),
}


def read_rows(part: Path, rows: Sequence[int], wanted: ReferenceColumns) -> list[ScoreRow]:
    """These rows of a part, in their order. Memory: the columns of the part that are wanted."""
    schema = pq.read_schema(part)
    names = ["positions", "token_ids", "log_prob", *(["entropy"] if wanted.entropy else [])]
    names += ["top_token_ids", "top_log_prob"] if wanted.top_k else []
    names = [name for name in names if name in schema.names]
    flag = ["truncated"] if "truncated" in schema.names else []
    table = pq.read_table(part, columns=[*names, *flag]).take(pa.array(rows, pa.int64()))
    lists = {name: _arrays(table[name].combine_chunks()) for name in names}
    truncated = table["truncated"].to_pylist() if flag else [False] * len(rows)
    return [
        ScoreRow(**{name: column[number] for name, column in lists.items()}, truncated=cut)
        for number, cut in enumerate(truncated)
    ]


def _arrays(column: Any) -> list[Any]:
    """The lists of an Arrow column; None where there is none."""
    lengths = column.value_lengths().fill_null(0).to_numpy()
    values = column.flatten().to_numpy(zero_copy_only=False)  # what is missing inside of a list is NaN
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return [part if valid else None for part, valid in zip(parts, column.is_valid().to_pylist(), strict=True)]

"""Where the scores of a record stand: a sorted table of keys, so that a worker reads only the parts that it needs.

Scores of `score` are found by the texts of the conversation, whatever file and line it now stands in: they may have
been selected, shuffled or written anew since. Those of other engines are found by file and line, or by id.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.text_hashes import text_hashes
from megatron_idft.files import complete_file

_NAME = "index.npy"
_MOST_CANDIDATES = 64  # records of one text, whose own tokens may differ
_ROWS = 32  # bits of a place that number the row in its part


class ScoreIndex:
    """Maps a key to places; the table is mapped into memory.

    Args:
        folder: that `write_index` was given.
    """

    def __init__(self, folder: Path):
        self._keys, self._places = np.load(folder / _NAME, mmap_mode="r")

    def places(self, key: int) -> list[tuple[int, int]]:
        """(part, row) of the scores with this key, in their order; the first of many."""
        first = int(np.searchsorted(self._keys, np.uint64(key)))
        last = int(np.searchsorted(self._keys[first : first + _MOST_CANDIDATES], np.uint64(key), side="right"))
        found = self._places[first : first + last].tolist()
        return [(place >> _ROWS, place & ((1 << _ROWS) - 1)) for place in found]


def write_index(folder: Path, keys: Iterable[NDArray[np.uint64]]) -> None:
    """Write the table of the keys of each part, in order. Memory: 32 bytes for each record that is scored."""
    parts = list(keys)
    rows = [np.arange(len(part), dtype=np.uint64) | np.uint64(number << _ROWS) for number, part in enumerate(parts)]
    table = np.array([np.concatenate(parts), np.concatenate(rows)])
    with complete_file(folder / _NAME) as building, open(building, "wb") as file:
        np.save(file, table[:, np.argsort(table[0], kind="stable")])


def has_index(folder: Path) -> bool:
    return (folder / _NAME).is_file()


def keys_of_texts(part: Path) -> NDArray[np.uint64]:
    """Of the records of a part of `score`."""
    table = pq.read_table(part, columns=["prompt_hash", "response_hash"])
    prompts, responses = (_numbers(column) for column in table.columns)
    return _joined(prompts, responses)


def text_key(record: Record) -> int:
    prompt, response = (np.array([int(text, 16)], np.uint64) for text in text_hashes(record))
    return int(_joined(prompt, response)[0])


def place_key(*parts: object) -> int:
    """Of an id, or of a file and a line."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _numbers(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(hashes.to_pylist())), ">u8").astype(np.uint64)


def _joined(prompts: NDArray[np.uint64], responses: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return prompts * np.uint64(0x9E3779B97F4A7C15) ^ responses

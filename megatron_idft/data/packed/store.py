"""Packs on disk, in Megatron's memory-mapped form with companions of the same prefix.

    PREFIX.bin, PREFIX.idx   token ids, int32, as Megatron's IndexedDataset: one sequence for each pack
    PREFIX.mask.bin          uint8 [tokens], 1 where the token is trained; or, where some records weigh their tokens,
    PREFIX.weight.bin        float32 [tokens], what the token counts for in the loss, 0 where it is not trained
    PREFIX.packs.bin         int64 [packs + 1], the first document of each pack
    PREFIX.starts.bin        int32 [documents], where each document begins in its pack, in tokens
    PREFIX.sources.bin       int32 [documents], an index into `sources` of the JSON
    PREFIX.records.bin       int64 [documents, 2], an index into `files` of the JSON, and the line (row) there, from 1
    PREFIX.json              settings and fingerprints, counts, names; written last
    PREFIX.records.parquet   only where each pack is one document: a row for each record, see record_index.py
    PREFIX.report.txt, .report.json, .errors.jsonl
    PREFIX.reference.bin     only with a reference model: log q of each token, float32 or float16 [tokens], and 0 where
                             it is not trained; its other columns are in .reference_entropy.bin [tokens] and, of the
                             K most probable tokens, .reference_top_ids.bin int32 and .reference_top.bin [tokens, K]

A pack holds whole documents, each with all of its n tokens. As input a document takes n - 1 positions, ids[:-1],
rounded up to pad_multiple; its labels are ids[1:]. The positions of a pack's documents sum up to at most seq_length,
so its tokens to at most seq_length + its number of documents.
"""

import json
import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.reference.columns import FILES, ReferenceColumns
from megatron_idft.errors import InputError

FORMAT = 1  # raise it whenever older readers could not read what is written
INDEX_HEADER = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4)  # version 1, int32
_INDEX_COUNTS = struct.Struct("<QQ")


def companion(prefix: str | Path, suffix: str) -> Path:
    """PREFIX and the suffix, dots in PREFIX untouched."""
    return Path(f"{prefix}{suffix}")


@dataclass(slots=True)
class Pack:
    """Views into the mapped files, of which only the used parts are read from disk.

    Attributes:
        ids: int32 [n].
        loss: [n], the token's weight in the loss, uint8 where no record of the store weighs its tokens, else float32,
            maybe negative.
        starts: int32 [documents], see above.
        sources: int32 [documents], see above.
        reference: the columns of the reference model by their names, each [n] or [n, K]; empty where there is none.
    """

    ids: NDArray[np.int32]
    loss: NDArray[Any]
    starts: NDArray[np.int32]
    sources: NDArray[np.int32]
    reference: dict[str, NDArray[Any]]

    @property
    def mask(self) -> NDArray[np.uint8]:
        """[n], 1 where the token is trained; the first of a document is never a label."""
        return self.loss if self.loss.dtype == np.uint8 else (self.loss != 0).astype(np.uint8)

    @property
    def weights(self) -> NDArray[np.float32] | None:
        """[n], or None where no record of the store weighs its tokens."""
        return None if self.loss.dtype == np.uint8 else self.loss

    def documents(self) -> list[slice]:
        """Which tokens each document has."""
        bounds = [*self.starts.tolist(), len(self.ids)]
        return [slice(begin, end) for begin, end in pairwise(bounds)]


class PackedStore:
    """Opened packs. Opening reads the JSON and compares the files' sizes with it; arrays are mapped at their first use.

    Pickles as its prefix.

    Attributes:
        meta: the content of PREFIX.json.

    Raises:
        InputError: there is no such store, it is of another format, or files are missing or of another size.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        path = companion(prefix, ".json")
        if not path.is_file():
            state = "is not finished: start the same `prepare` again" if companion(prefix, ".chunks").is_dir() else ""
            state = state or f"is missing: {self._absent()}"
            raise InputError(f"no packs at {prefix}: {path.name} {state}")
        try:
            self.meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.meta["kind"] != "megatron-idft packs":
                raise ValueError("it is no description of packs")
            if self.meta["format"] != FORMAT:
                raise InputError(f"{path}: format {self.meta['format']}, this version reads {FORMAT}: {self._again()}")
            packs, documents, tokens = (int(self.meta[key]) for key in ("packs", "documents", "tokens"))
            loss = (".weight.bin", 4 * tokens) if self.meta["weighted"] else (".mask.bin", tokens)
            of_reference = self.reference.token_bytes if self.reference else {}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged or of another program ({error}): {self._again()}") from error
        for suffix, size in (
            (".bin", 4 * tokens),
            (".idx", len(INDEX_HEADER) + _INDEX_COUNTS.size + 20 * packs + 8),
            loss,
            (".packs.bin", 8 * packs + 8),
            (".starts.bin", 4 * documents),
            (".sources.bin", 4 * documents),
            (".records.bin", 16 * documents),
            *((FILES[name], size * tokens) for name, size in of_reference.items()),
        ):
            file = companion(prefix, suffix)
            found = file.stat().st_size if file.exists() else None
            if found != size:
                raise InputError(f"{file} should hold {size} bytes, found {found}: {self._again()}")
        self._arrays: dict[str, NDArray[Any]] = {}

    def _absent(self) -> str:
        """The remedy where there are no packs."""
        return "`megatron-idft prepare --output PREFIX` writes it, name that PREFIX"

    def _again(self) -> str:
        """The remedy for damage."""
        return "prepare the data again"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,)

    def __len__(self) -> int:
        return int(self.meta["packs"])

    @property
    def seq_length(self) -> int:
        return int(self.meta["seq_length"])

    @property
    def sources(self) -> list[str]:
        """The names of all sources, in the order in which they come up."""
        return list(self.meta["sources"])

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The token ids that end assistant turns."""
        return list(self.meta["end_of_turn_ids"])

    @property
    def reference(self) -> ReferenceColumns | None:
        """The columns of a reference model that the packs have; None for none."""
        found = self.meta.get("reference")
        return None if found is None else ReferenceColumns.recorded(found)

    def pack(self, index: int) -> Pack:
        """The pack with this number.

        Raises:
            IndexError: outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        packs = self._map(".packs.bin", np.int64)
        first, last = int(packs[index]), int(packs[index + 1])
        begin, end = self._tokens_of(index)
        loss = self._map(".weight.bin", np.float32) if self.meta["weighted"] else self._map(".mask.bin", np.uint8)
        return Pack(
            self._map(".bin", np.int32)[begin:end],
            loss[begin:end],
            self._map(".starts.bin", np.int32)[first:last],
            self._map(".sources.bin", np.int32)[first:last],
            {name: column[begin:end] for name, column in self._reference_columns().items()},
        )

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Of all packs, one after the other: int32 [tokens], mapped."""
        return self._map(".bin", np.int32)

    def place(self, position: int) -> tuple[str, int]:
        """The file and line (row) of the document that holds the token at `position` of `token_ids`."""
        index = bisect_right(range(len(self)), position, key=lambda pack: self._tokens_of(pack)[0]) - 1
        starts = self.pack(index).starts
        document = int(np.searchsorted(starts, position - self._tokens_of(index)[0], side="right")) - 1
        return self.origins(index)[document]

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each pack, int32 [packs]."""
        head = len(INDEX_HEADER) + _INDEX_COUNTS.size
        return self._map(".idx", np.uint8)[head : head + 4 * len(self)].view("<i4")

    def most_documents(self) -> int:
        """Of any pack."""
        return int(np.diff(self._map(".packs.bin", np.int64)).max(initial=0))

    def longest_document(self, multiple_of: int = 1) -> int:
        """Positions of any document in a sequence, where each is padded to a multiple of so many."""
        longest = 2  # tokens, of which the last is a label only
        if len(self):  # else there is nothing to map
            starts, packs = self._map(".starts.bin", np.int32), self._map(".packs.bin", np.int64)
            longest = int(np.diff(starts).max(initial=longest))  # from one pack to the next it is never positive
            longest = int((self.lengths() - starts[packs[1:] - 1]).max(initial=longest))  # a pack's last documents
        return -(-(longest - 1) // multiple_of) * multiple_of

    def origins(self, index: int) -> list[tuple[str, int]]:
        """The file and line (row) of each document of a pack."""
        packs = self._map(".packs.bin", np.int64)
        rows = self._map(".records.bin", np.int64).reshape(-1, 2)[packs[index] : packs[index + 1]]
        return [(self.meta["files"][file], line) for file, line in rows.tolist()]

    def require(self, tokenizer: ChatTokenizer, seq_length: int, pad_multiple: int = 1) -> None:
        """Refuse packs that were not made for this use.

        Args:
            tokenizer: of the training.
            seq_length: of the training.
            pad_multiple: the training pads each document to a multiple of it; the packs must have room for that.

        Raises:
            InputError: names each difference and the remedy.
        """
        differences = []
        if tokenizer.fingerprint() != self.meta["settings"]["tokenizer"]:
            same = tokenizer.template.source == self.meta["chat_template"]
            what = "tokenizer (the template's source is the same)" if same else "tokenizer or chat template"
            differences.append(
                f"the {what}: fingerprint {self.meta['settings']['tokenizer'][:16]}… in the packs, "
                f"{tokenizer.fingerprint()[:16]}… now"
            )
        if seq_length != self.seq_length:
            differences.append(f"the sequence length: {self.seq_length} in the packs, {seq_length} now")
        if self.meta["pad_multiple"] % pad_multiple:
            differences.append(
                f"what documents are padded to: a multiple of {self.meta['pad_multiple']} in the packs, of "
                f"{pad_multiple} now"
            )
        if differences:
            raise InputError(
                f"the packs at {self.prefix} were prepared for another training:\n  "
                + "\n  ".join(differences)
                + "\nRemedy: give training the same --tokenizer-model, --chat-template and --seq-length, or prepare "
                f"the data with these and --pad-multiple {pad_multiple} to another --output"
            )

    def _tokens_of(self, index: int) -> tuple[int, int]:
        head = len(INDEX_HEADER) + _INDEX_COUNTS.size
        raw, packs = self._map(".idx", np.uint8), len(self)
        length = int(raw[head + 4 * index : head + 4 * index + 4].view("<i4")[0])
        at = head + 4 * packs + 8 * index
        begin = int(raw[at : at + 8].view("<i8")[0]) // 4
        return begin, begin + length

    def _reference_columns(self) -> dict[str, NDArray[Any]]:
        columns = self.reference
        if columns is None:
            return {}
        mapped = {name: self._map(FILES[name], columns.dtype_of(name)) for name in columns.shapes}
        return {name: mapped[name].reshape(-1, *shape) for name, shape in columns.shapes.items()}

    def _map(self, suffix: str, dtype: Any) -> NDArray[Any]:
        if suffix not in self._arrays:
            self._arrays[suffix] = np.memmap(companion(self.prefix, suffix), dtype=dtype, mode="r")
        return self._arrays[suffix]


def write_index(write: Callable[[bytes], object], lengths: NDArray[np.int64]) -> None:
    """Megatron's index of sequences of these lengths, int32 tokens, each a document of its own to Megatron."""
    write(INDEX_HEADER + _INDEX_COUNTS.pack(len(lengths), len(lengths) + 1))
    write(lengths.astype("<i4").tobytes())
    write((4 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
    write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

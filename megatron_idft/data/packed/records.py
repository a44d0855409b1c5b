"""Record files tokenized once into a cache folder, and opened by every later launch.

The cache is a folder `tokens-<fingerprint>` that holds packs, see store.py: of one document each in the order of the
records, or of several. The fingerprint covers the sources, the tokenizer with its chat template, the settings and the
format, so nothing is used for anything but what it was made from. It is built in a folder of its own that is renamed
when it is complete: a build that was killed leaves nothing that could be taken for a cache, and of several builders
the first one wins.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_idft.corpus.records import check_files
from megatron_idft.corpus.scores.rows import RecordOrigin
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed import summary
from megatron_idft.data.packed.counts import Counts
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.record_index import read_index
from megatron_idft.data.packed.store import PackedStore, companion
from megatron_idft.errors import InputError
from megatron_idft.files import building

_NAME = "records"  # of the packs in the folder


class TokenizedRecords(PackedStore):
    """Packs in a cache folder. What numbers records is for packs of one document each: pack i is record i.

    Args:
        path: the folder.
        paths: the record files, by the names of this launch; None: by those of the launch that tokenized them.

    Raises:
        InputError: files are missing or of another size.
    """

    def __init__(self, path: str | Path, paths: Sequence[str] | None = None):
        self.path, self._paths = Path(path), paths
        super().__init__(self.path / _NAME)
        now = list(self.meta["files"] if paths is None else paths)
        self._names = dict(zip(self.meta["files"], now, strict=True))
        self.meta["files"] = now

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._paths)

    def _absent(self) -> str:
        return self._again()

    def _again(self) -> str:
        return f"delete {self.path} to tokenize the records again"

    @property
    def counts(self) -> Counts:
        """The counts of their tokenization."""
        return Counts(**self.meta["counts"])

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids int32 [n] and loss mask uint8 [n] of a record, n <= seq_length + 1."""
        pack = self.pack(index)
        return pack.ids, pack.mask

    def records(self, indices: Sequence[int] | None = None) -> list[RecordOrigin]:
        """Where the records of these indices (None: all) came from."""
        try:
            rows = read_index(companion(self.prefix, ".records.parquet"), indices)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.prefix}.records.parquet cannot be read ({error}): {self._again()}") from error
        for row in rows:
            then, now = row["file"], self._names[row["file"]]
            if row["id"] == f"{then}:{row['line']}":  # an id of ours, of files that share a name
                row["id"] = f"{now}:{row['line']}"
            row["file"] = now
        return rows

    def report(self) -> str:
        """The records and tokens read, kept, cut and left out, as text for a person."""
        try:
            return summary.read(self.prefix)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.prefix}.report.json cannot be read ({error}): {self._again()}") from error


def tokenize_records(
    settings: PrepareSettings, tokenizer: ChatTokenizer, cache_dir: str | Path, *, progress: bool = True
) -> TokenizedRecords:
    """Open the cache of these records under `cache_dir`, building it first unless it is there.

    An input of more than one chunk is tokenized by as many processes as this one may use processors.

    Raises:
        RecordError: names file, line and field of a bad record, or of one that is too long.
        TemplateError: the chat template does not prove the loss mask, whatever `settings.bad_records` says.
        InputError: no record is left to train on.
        PrepareError: a process dies, or the disk is full.
    """
    final = _folder(settings, tokenizer, cache_dir)
    if not final.exists():
        small = sum(Path(path).stat().st_size for path in settings.paths) <= settings.chunk_bytes
        with building(final) as folder:
            prepare(settings, tokenizer, folder / _NAME, workers=0 if small else None, progress=progress)
    return TokenizedRecords(final, settings.paths)


def open_tokenized_records(
    settings: PrepareSettings, tokenizer: ChatTokenizer, cache_dir: str | Path
) -> TokenizedRecords:
    """Open what `tokenize_records` makes of the same arguments; for the ranks that wait while one builds.

    Raises:
        InputError: it is not there.
    """
    final = _folder(settings, tokenizer, cache_dir)
    if not final.exists():
        raise InputError(
            f"no tokenized records at {final}: tokenize_records must finish first, with the same files, tokenizer,"
            " template and settings, on this machine or on a shared file system"
        )
    return TokenizedRecords(final, settings.paths)


def _folder(settings: PrepareSettings, tokenizer: ChatTokenizer, cache_dir: str | Path) -> Path:
    check_files(settings.paths)
    described = settings.of_packs(tokenizer.fingerprint()) | {"bad_records": settings.bad_records}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    return Path(cache_dir) / f"tokens-{digest}"

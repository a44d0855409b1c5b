"""A corpus as memory-mapped token arrays: built once in one streaming pass, reused by every later launch.

A cache is a folder `tokens-<fingerprint>` that holds

    tokens.bin     int32 [tokens]       the ids of all conversations, one after the other
    loss_mask.bin  uint8 [tokens]       1 where the token is trained
    weights.bin    float32 [tokens]     only where some record weighs its tokens: the weight in the loss; 0 where it is
                                        the mask's own 0 or 1
    offsets.bin    int64 [records + 1]  where each conversation begins
    sources.bin    int32 [records]      an index into `sources` of meta.json: names of sources, or of files where a
                                        record names none
    records.parquet                     id, file, line and source of each, see record_index.py
    meta.json      fingerprint, settings, counts
    errors.jsonl   the bad records that were skipped, if any

The fingerprint covers the sources, the tokenizer with its chat template, the settings and the format, so a cache is
never used for anything but what it was built from. A build happens in a folder of its own that is renamed when it is
complete: a killed build leaves nothing that could be taken for a cache, and of several builders the first one wins.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import ErrorLog, Record, read_records
from megatron_idft.corpus.scores.rows import RecordOrigin
from megatron_idft.data.building import BuildProgress, WeightsFile
from megatron_idft.data.chat.conversations import (
    EncodedConversation,
    RenderedConversation,
    render_conversation,
    tokenize,
)
from megatron_idft.data.chat.pretokenized import PretokenizedReader
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.record_index import RecordIndexWriter, read_record_index
from megatron_idft.data.token_counts import Counts, report_counts
from megatron_idft.errors import CacheError, ConversationError, RecordError, TemplateError
from megatron_idft.files import building, describe_source, sync, synced_file

FORMAT = 6  # raise it whenever the same corpus would give other bytes
Truncation = Literal["truncate", "drop", "error"]
BadRecords = Literal["stop", "skip"]
_BATCH_RECORDS, _BATCH_CHARACTERS = 512, 1 << 21  # what is held in memory between reader and tokenizer


@dataclass(slots=True)
class _Settings:
    paths: list[str]
    tokenizer: ChatTokenizer
    seq_length: int
    truncation: Truncation
    on_bad_record: BadRecords
    last_turn_only: bool

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("no record files given")
        if self.seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {self.seq_length}")
        if self.truncation not in get_args(Truncation):
            raise ValueError(f"truncation must be one of {get_args(Truncation)}, got {self.truncation!r}")
        if self.on_bad_record not in get_args(BadRecords):
            raise ValueError(f"on_bad_record must be one of {get_args(BadRecords)}, got {self.on_bad_record!r}")

    def describe(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sources": [describe_source(Path(path)) for path in self.paths],
            "tokenizer": self.tokenizer.fingerprint(),
            "seq_length": self.seq_length,
            "truncation": self.truncation,
            "on_bad_record": self.on_bad_record,
            "last_turn_only": self.last_turn_only,
        }


class TokenCache:
    """An open cache. Opening reads only meta.json; the arrays are mapped at their first use, and pickle as a path.

    meta: the content of meta.json. counts: what the build met. seq_length: records hold at most seq_length + 1 tokens.
    end_of_turn_ids: the token ids that end assistant turns in this corpus. sources: the names of all sources, in the
    order in which they come up.

    Raises CacheError when files are missing or not of the size that meta.json says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError(f"{self.path} is not a token cache: {error}") from error
        self.counts = Counts(**self.meta["counts"])
        self.seq_length = int(self.meta["settings"]["seq_length"])
        self.end_of_turn_ids: list[int] = self.meta["end_of_turn_ids"]
        self.sources: list[str] = self.meta["sources"]
        counts = self.counts
        for name, size in (
            ("tokens", 4 * counts.tokens),
            ("loss_mask", counts.tokens),
            ("offsets", 8 * counts.kept + 8),
            ("sources", 4 * counts.kept),
            *([("weights", 4 * counts.tokens)] if counts.weighted else []),
        ):
            file = self.path / f"{name}.bin"
            found = file.stat().st_size if file.exists() else None
            if found != size:
                raise CacheError(
                    f"{file} should hold {size} bytes, found {found}: delete {self.path} to build it again"
                )
        self._arrays: tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]] | None = None
        self._weights: NDArray[np.float32] | None = None
        self._sources: NDArray[np.int32] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return self.counts.kept

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids int32 [n] and loss mask uint8 [n] of a record, n <= seq_length + 1: views into the mapped files."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        tokens, mask, offsets = self._map()
        start, end = offsets[index : index + 2]
        return tokens[start:end], mask[start:end]

    def weights(self, index: int) -> NDArray[np.float32] | None:
        """What each token of a record weighs in the loss, float32 [n], > 0 just where the mask is 1; None: the mask."""
        _, mask = self[index]
        if not self.counts.weighted:
            return None
        if self._weights is None:
            self._weights = np.memmap(self.path / "weights.bin", dtype=np.float32, mode="r")
        start, end = self._map()[2][index : index + 2]
        weights = self._weights[start:end]
        return np.where(weights > 0, weights, mask.astype(np.float32)) if weights.any() else None

    def source(self, index: int) -> int:
        """The number of a record's source, an index into `sources`."""
        if self._sources is None:
            self._sources = np.memmap(self.path / "sources.bin", dtype=np.int32, mode="r")
        return int(self._sources[index])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, int64 [records]."""
        return np.diff(self._map()[2])

    def records(self, indices: Sequence[int] | None = None) -> list[RecordOrigin]:
        """Where the records of these indices (None: all) came from, see `read_record_index`."""
        return read_record_index(self.path / "records.parquet", indices)

    def _map(self) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
        if self._arrays is None:
            self._arrays = (
                np.memmap(self.path / "tokens.bin", dtype=np.int32, mode="r"),
                np.memmap(self.path / "loss_mask.bin", dtype=np.uint8, mode="r"),
                np.memmap(self.path / "offsets.bin", dtype=np.int64, mode="r"),
            )
        return self._arrays

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Of all records, one after the other: int32 [tokens], mapped."""
        return self._map()[0]

    def place(self, position: int) -> tuple[str, int]:
        """The file and line of the record that holds the token at `position` of `token_ids`."""
        record = int(np.searchsorted(self._map()[2], position, side="right")) - 1
        [row] = self.records([record])
        return row["file"], row["line"]

    def report(self) -> str:
        """What was read, kept, cut and left out, as text for a person."""
        return report_counts(self.counts, self.seq_length, self.path)


def build_token_cache(
    paths: Sequence[str | Path],
    *,
    tokenizer: ChatTokenizer,
    seq_length: int,
    cache_dir: str | Path,
    truncation: Truncation = "truncate",
    on_bad_record: BadRecords = "stop",
    last_turn_only: bool = False,
    progress: bool = True,
) -> TokenCache:
    """Open the token cache of these records under `cache_dir`, building it first unless it is there. In one process.

    Records that carry `token_ids` and `loss_mask` keep them, cut to seq_length like all others; see pretokenized.py.

    seq_length: records longer than seq_length + 1 tokens (inputs and shifted labels) are cut on the right (`truncate`),
        left out (`drop`), or end the build (`error`); records without a trained token are left out. All are counted.
    on_bad_record: `stop` raises at the first malformed record; `skip` counts it and writes it to errors.jsonl in the
    cache. last_turn_only: no assistant turn is trained but the last. progress: a tqdm bar on stderr.

    Raises RecordError naming file, line and field; TemplateError, whatever on_bad_record says, when the chat template
    does not prove the loss mask; CacheError when no record is left.
    """
    settings = _Settings(
        [str(path) for path in paths], tokenizer, seq_length, truncation, on_bad_record, last_turn_only
    )
    described = settings.describe()
    final = Path(cache_dir) / _folder(described)
    if final.exists():
        return TokenCache(final)
    with building(final) as folder:
        _build(folder, settings, described, progress)
    return TokenCache(final)


def open_token_cache(
    paths: Sequence[str | Path],
    *,
    tokenizer: ChatTokenizer,
    seq_length: int,
    cache_dir: str | Path,
    truncation: Truncation = "truncate",
    on_bad_record: BadRecords = "stop",
    last_turn_only: bool = False,
) -> TokenCache:
    """Open the cache that `build_token_cache` makes of the same arguments; for the ranks that wait while one builds.

    Raises CacheError when it is not there.
    """
    settings = _Settings(
        [str(path) for path in paths], tokenizer, seq_length, truncation, on_bad_record, last_turn_only
    )
    final = Path(cache_dir) / _folder(settings.describe())
    if not final.exists():
        raise CacheError(
            f"no token cache at {final}: build_token_cache must finish first, with the same files, tokenizer, template "
            "and settings, on this machine or on a shared file system"
        )
    return TokenCache(final)


def _folder(described: dict[str, Any]) -> str:
    return f"tokens-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]}"


def _build(folder: Path, settings: _Settings, described: dict[str, Any], progress: bool) -> None:
    counts = Counts()
    end_ids: set[int] = set()
    numbers: dict[str, int] = {}
    largest_id = -1
    with ExitStack() as stack:
        tokens, mask, offsets, sources = files = [
            stack.enter_context(open(folder / f"{name}.bin", "wb"))
            for name in ("tokens", "loss_mask", "offsets", "sources")
        ]
        weights = stack.enter_context(WeightsFile(folder / "weights.bin"))
        index = stack.enter_context(RecordIndexWriter(folder / "records.parquet"))
        errors = stack.enter_context(ErrorLog(folder / "errors.jsonl"))
        offsets.write(np.int64(0).tobytes())
        for record, encoded in _encode(
            settings, errors, counts, stack.enter_context(BuildProgress(settings.paths, progress))
        ):
            fitted = _fit(record, encoded, settings, counts)
            if fitted is None:
                continue
            ids, trained, weighted = fitted
            index.add(record, truncated=len(ids) < len(encoded.ids))
            tokens.write(ids.astype("<i4", copy=False).tobytes())
            mask.write(trained.tobytes())
            if weighted is not None:
                weights.write(counts.tokens, weighted)
            counts.kept += 1
            counts.tokens += len(ids)
            counts.trained_tokens += int(trained[1:].sum())
            offsets.write(np.int64(counts.tokens).tobytes())
            sources.write(np.int32(numbers.setdefault(record.source_name, len(numbers))).tobytes())
            end_ids |= encoded.end_ids
            largest_id = max(largest_id, int(ids.max()))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        weights.complete(counts.tokens)
    sync(folder / "records.parquet")
    if not counts.kept:
        raise CacheError(
            "no record is left to train on: pass a longer --seq-length, or records with trained turns\n"
            + report_counts(counts, settings.seq_length, None)
        )
    meta = {
        "settings": described,
        "paths": settings.paths,
        "chat_template": settings.tokenizer.template.source,
        "end_of_turn_ids": sorted(end_ids),
        "sources": list(numbers),
        "largest_id": largest_id,
        "counts": asdict(counts),
    }
    with synced_file(folder / "meta.json") as text:
        json.dump(meta, text, indent=1, ensure_ascii=False)


def _encode(
    settings: _Settings, errors: ErrorLog, counts: Counts, progress: BuildProgress
) -> Iterator[tuple[Record, EncodedConversation]]:
    """Every good record with its tokens, in order. Batches, because tokenizers encode batches on all cores."""
    tokenizer, pretokenized = settings.tokenizer, PretokenizedReader(settings.tokenizer, settings.last_turn_only)
    batch: list[tuple[Record, RenderedConversation | EncodedConversation]] = []
    size = 0

    def on_error(error: RecordError) -> None:
        if settings.on_bad_record == "stop":
            raise error
        errors(error)
        counts.records += 1
        counts.bad += 1

    def flush() -> Iterator[tuple[Record, EncodedConversation]]:
        rendered = [(record, item) for record, item in batch if isinstance(item, RenderedConversation)]
        try:
            tokenized = iter(tokenize(tokenizer, [item for _, item in rendered]))
        except TemplateError:
            for record, conversation in rendered:  # name the record that is to blame
                try:
                    tokenize(tokenizer, [conversation])
                except TemplateError as error:
                    raise TemplateError(f"{record.file}, line {record.line}: {error}") from error
            raise
        for record, item in batch:
            yield record, item if isinstance(item, EncodedConversation) else next(tokenized)
        progress.records(len(batch))
        batch.clear()

    for record in read_records(settings.paths, on_error=on_error, on_bytes=progress.bytes):
        item: RenderedConversation | EncodedConversation | None
        try:
            item = pretokenized.read(record)
            if item is None:
                item = render_conversation(
                    tokenizer, record.messages, tools=record.tools, last_turn_only=settings.last_turn_only
                )
        except RecordError as error:
            on_error(error)
            continue
        except ConversationError as error:
            raw = json.dumps(record.messages, ensure_ascii=False, default=str)
            on_error(RecordError(record.file, record.line, "messages", str(error), raw))
            continue
        except TemplateError as error:
            raise TemplateError(f"{record.file}, line {record.line}: {error}") from error
        counts.records += 1
        if isinstance(item, RenderedConversation):
            counts.spells_special += item.spells_special
            counts.unwritten += item.unwritten
            size += len(item.text)
        else:
            size += len(item.ids)
        batch.append((record, item))
        if len(batch) == _BATCH_RECORDS or size > _BATCH_CHARACTERS:
            yield from flush()
            size = 0
    yield from flush()


def _fit(
    record: Record, encoded: EncodedConversation, settings: _Settings, counts: Counts
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.float32] | None] | None:
    """Ids, mask and weights cut to seq_length + 1 tokens; None: the record is left out. The first token is no label."""
    ids, mask, limit = encoded.ids, encoded.mask, settings.seq_length + 1
    trained = int(mask[1:].sum())
    if len(ids) > limit and trained:
        if settings.truncation == "error":
            field = "token_ids" if encoded.pretokenized else "messages"
            message = f"{len(ids)} tokens are more than seq_length + 1 = {limit}"
            raise RecordError(record.file, record.line, field, message)
        if settings.truncation == "drop":
            counts.dropped += 1
            counts.lost_trained_tokens += trained
            return None
        ids, mask = ids[:limit], mask[:limit]
        counts.lost_trained_tokens += trained - int(mask[1:].sum())
    if not mask[1:].any():
        counts.empty += 1
        return None
    counts.truncated += len(ids) < len(encoded.ids)
    counts.straddling_spans += encoded.straddles
    counts.pretokenized += encoded.pretokenized
    counts.weighted += encoded.weights is not None
    return ids, mask, None if encoded.weights is None else encoded.weights[: len(ids)]

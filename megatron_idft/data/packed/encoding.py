"""A block of records -> documents of token ids with what each token counts for in the loss."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.scores.rows import RecordOrigin
from megatron_idft.data.chat.conversations import (
    EncodedConversation,
    RenderedConversation,
    tokenize,
)
from megatron_idft.data.chat.pretokenized import PretokenizedReader
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed.blocks import Block, parse_block
from megatron_idft.data.packed.chunks import Chunk, ChunkInfo
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.record_index import indexed
from megatron_idft.data.packed.rendering import Renderer
from megatron_idft.data.reference.own import Kept
from megatron_idft.data.reference.reader import Columns, ReferenceReader
from megatron_idft.errors import ConversationError, RecordError, TemplateError

_OWN_COLUMNS = ("token_ids", "loss_mask")
# Bounds of a batch between parser and tokenizer. Small ones stay in the processor's caches.
_BATCH_RECORDS, _BATCH_CHARACTERS = 128, 1 << 18
SOURCE_FIGURES = ("records", "documents", "tokens", "trained_tokens", "truncated", "dropped", "empty")


class BlockEncoder:
    """Encodes blocks by one tokenizer and one set of settings; the result depends only on the block.

    Args:
        reference: finds the numbers of the reference model; None: there are none, whatever the settings say.
    """

    def __init__(self, tokenizer: ChatTokenizer, settings: PrepareSettings, reference: ReferenceReader | None = None):
        self._tokenizer, self._settings, self._reference = tokenizer, settings, reference
        self._pretokenized = PretokenizedReader(tokenizer, settings.last_turn_only)

    def encode(self, block: Block) -> Chunk:
        """The block's documents in the order of its records.

        Raises:
            RecordError: the first bad record under bad_records="stop", or a too long one under truncation="error". One
                without its numbers of the reference model comes after those that are bad in themselves.
            TemplateError: the chat template does not prove the mask, whatever bad_records says.
        """
        info = ChunkInfo(block.index, block.file_number, block.first)
        builder = _Builder(info, self._settings)
        records = self._records(block, builder)
        if self._reference is None:
            for record, encoded in records:
                builder.add(record, encoded)
        else:
            self._add_with_reference(self._reference, list(records), builder)
        return builder.chunk()

    def _add_with_reference(
        self, reference: ReferenceReader, records: list[tuple[Record, EncodedConversation]], builder: "_Builder"
    ) -> None:
        """All at once: so each part of the scores is read once for a block."""
        found = reference.read([self._kept(record, encoded) for record, encoded in records])
        for (record, encoded), columns in zip(records, found, strict=True):
            if isinstance(columns, RecordError):
                builder.bad(columns)
            else:
                builder.add(record, encoded, columns)
        builder.info.errors.sort(key=lambda error: error["line"])

    def _kept(self, record: Record, encoded: EncodedConversation) -> Kept:
        limit, trained = self._settings.seq_length + 1, np.flatnonzero(encoded.mask[1:]) + 1
        left_out = len(encoded.ids) > limit and self._settings.truncation != "truncate"
        kept = trained[: 0 if left_out else np.searchsorted(trained, limit)]
        return Kept(record, encoded.ids[:limit], kept, len(encoded.ids), len(trained))

    def _records(self, block: Block, builder: "_Builder") -> Iterator[tuple[Record, EncodedConversation]]:
        batch: list[tuple[Record, RenderedConversation | EncodedConversation]] = []
        settings = self._settings
        renderer = Renderer(self._tokenizer, settings.last_turn_only, settings.prompt_weight)  # new: the block decides
        size = 0
        for _, record in parse_block(block):
            if isinstance(record, RecordError):
                builder.bad(record)
                continue
            builder.info.forms[record.form] = builder.info.forms.get(record.form, 0) + 1
            try:
                own = self._pretokenized.read(record) if not record.extra.keys().isdisjoint(_OWN_COLUMNS) else None
                item = own or renderer.render(record)
            except RecordError as error:
                builder.bad(error)
                continue
            except ConversationError as error:
                raw = json.dumps(record.messages, ensure_ascii=False, default=str)
                builder.bad(RecordError(record.file, record.line, "messages", str(error), raw))
                continue
            except TemplateError as error:
                raise TemplateError(f"{record.file}, line {record.line}: {error}") from error
            if isinstance(item, RenderedConversation):
                builder.counts.spells_special += item.spells_special
                builder.counts.unwritten += item.unwritten
            size += len(item.text) if isinstance(item, RenderedConversation) else len(item.ids)
            batch.append((record, item))
            if len(batch) == _BATCH_RECORDS or size > _BATCH_CHARACTERS:
                yield from self._tokenized(batch)
                batch, size = [], 0
        yield from self._tokenized(batch)

    def _tokenized(
        self, batch: list[tuple[Record, RenderedConversation | EncodedConversation]]
    ) -> Iterator[tuple[Record, EncodedConversation]]:
        rendered = [(record, item) for record, item in batch if isinstance(item, RenderedConversation)]
        try:
            tokenized = iter(tokenize(self._tokenizer, [item for _, item in rendered]))
        except TemplateError:
            for record, conversation in rendered:  # name the record that is to blame
                try:
                    tokenize(self._tokenizer, [conversation])
                except TemplateError as error:
                    raise TemplateError(f"{record.file}, line {record.line}: {error}") from error
            raise
        for record, item in batch:
            yield record, item if isinstance(item, EncodedConversation) else next(tokenized)


class _Builder:
    """Collects the documents of one block."""

    def __init__(self, info: ChunkInfo, settings: PrepareSettings):
        self.info, self.counts, self._settings = info, info.counts, settings
        self._documents: list[EncodedConversation] = []
        self._columns: list[Columns] = []
        if settings.reference is not None:
            columns = settings.reference.columns
            info.reference = {"entropy": columns.entropy, "top_k": columns.top_k, "dtype": columns.dtype}
        self._lines: list[int] = []
        self._records: list[RecordOrigin] = []
        self._sources: list[int] = []
        self._numbers: dict[str, int] = {}
        self._number_of: dict[str | None, int] = {}  # by what records say; all of the block are from one file
        self._end_ids: set[int] = set()
        self._lengths: Counter[int] = Counter()

    def bad(self, error: RecordError) -> None:
        if self._settings.bad_records == "stop":
            raise error
        self.info.errors.append(error.parts())
        self.counts.records += 1
        self.counts.bad += 1

    def add(self, record: Record, encoded: EncodedConversation, columns: Columns | None = None) -> None:
        source = self._number_of.get(record.source)
        if source is None:
            source = self._number_of[record.source] = self._source(record.source_name)
        figures = self.info.per_source[source]
        self.counts.records += 1
        figures["records"] += 1
        self._lengths[len(encoded.ids).bit_length()] += 1
        length = len(encoded.ids)
        trained = self._fit(record, encoded, figures)
        if not trained:
            return
        tokens = len(encoded.ids)
        figures["tokens"] += tokens
        self.counts.tokens += tokens
        figures["trained_tokens"] += trained
        self.counts.trained_tokens += trained
        figures["documents"] += 1
        self.counts.kept += 1
        self.counts.straddling_spans += encoded.straddles
        self.counts.pretokenized += encoded.pretokenized
        self.counts.weighted += encoded.weights is not None
        if encoded.weights is not None or encoded.prompts:
            self.info.weigh((encoded.mask if encoded.weights is None else encoded.weights)[1:], encoded.prompts)
        self._end_ids |= encoded.end_ids
        self._documents.append(encoded)
        if columns is not None:
            self._columns.append(columns)
        self._lines.append(record.line)
        self._sources.append(source)
        if not self._settings.packing:
            self._records.append(indexed(record, truncated=tokens < length))

    def _source(self, name: str) -> int:
        source = self._numbers.setdefault(name, len(self._numbers))
        if source == len(self.info.sources):
            self.info.sources.append(name)
            self.info.per_source.append(dict.fromkeys(SOURCE_FIGURES, 0))
        return source

    def _fit(self, record: Record, encoded: EncodedConversation, figures: dict[str, int]) -> int:
        """Cut `encoded` to seq_length + 1 tokens. The number of trained ones, 0 if it is left out. The first token is
        never a label."""
        limit, trained = self._settings.seq_length + 1, int(np.count_nonzero(encoded.mask[1:]))
        too_long = len(encoded.ids) > limit
        if too_long and trained:
            if self._settings.truncation == "error":
                field = "token_ids" if encoded.pretokenized else "messages"
                message = f"{len(encoded.ids)} tokens are more than seq_length + 1 = {limit}"
                raise RecordError(record.file, record.line, field, message)
            if self._settings.truncation == "drop":
                self.counts.dropped += 1
                figures["dropped"] += 1
                self.counts.lost_trained_tokens += trained
                return 0
        kept = int(np.count_nonzero(encoded.mask[1:limit])) if too_long else trained
        self.counts.lost_trained_tokens += trained - kept
        if not kept:
            self.counts.empty += 1
            figures["empty"] += 1
            return 0
        if too_long:
            self.counts.truncated += 1
            figures["truncated"] += 1
            encoded.ids, encoded.mask = encoded.ids[:limit], encoded.mask[:limit]
            encoded.weights = None if encoded.weights is None else encoded.weights[:limit]
        return kept

    def chunk(self) -> Chunk:
        documents, info = self._documents, self.info
        info.documents, info.tokens = len(documents), self.counts.tokens
        info.weighted = any(document.weights is not None for document in documents)
        info.end_ids = sorted(self._end_ids)
        info.largest_id = max((int(document.ids.max()) for document in documents), default=-1)
        info.lengths = {str(bits): self._lengths[bits] for bits in sorted(self._lengths)}
        losses = [
            document.mask if document.weights is None else document.weights.astype(np.float32) for document in documents
        ]
        return Chunk(
            info,
            np.array(self._lines, dtype=np.int64),
            np.concatenate([document.ids for document in documents] or [np.empty(0, np.int32)]),
            np.array([len(document.ids) for document in documents], dtype=np.int32),
            np.array(self._sources, dtype=np.int32),
            np.concatenate(losses or [np.empty(0, np.uint8)]),
            None if self._settings.packing else self._records,
            self._reference(),
        )

    def _reference(self) -> dict[str, list[NDArray[Any]]]:
        if self.info.reference is None or self.info.columns is None:
            return {}
        sums = (float(columns["log_prob"].sum(dtype=np.float64)) for columns in self._columns)
        self.info.reference["log_prob_sum"] = sum(sums)
        return {name: [columns[name] for columns in self._columns] for name in self.info.columns.shapes}

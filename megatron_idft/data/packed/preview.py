"""The content of packs, for a person to read."""

from collections import Counter
from collections.abc import Iterator

from megatron_idft.corpus.formats import describe_forms
from megatron_idft.data.chat.show import render_sample
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed.blocks import read_blocks
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.errors import RecordError


def show_packs(store: PackedStore, tokenizer: ChatTokenizer, count: int) -> Iterator[str]:
    """The first packs, decoded, document by document, with the trained spans marked."""
    for index in range(min(count, len(store))):
        pack = store.pack(index)
        inputs = len(pack.ids) - len(pack.starts)
        text = [f"pack {index}: {len(pack.starts)} documents, {inputs:,} of {store.seq_length:,} positions"]
        places = zip(pack.documents(), store.origins(index), pack.sources.tolist(), strict=True)
        for number, (tokens, (file, line), source) in enumerate(places):
            text.append(f"document {number}: {file}, line {line}, source {store.meta['sources'][source]!r}")
            text.append(render_sample(pack.ids[tokens], pack.loss[tokens], tokenizer))
        yield "\n".join(text)


def show_records(settings: PrepareSettings, tokenizer: ChatTokenizer, count: int) -> Iterator[str]:
    """The first records as documents, without writing anything.

    Raises:
        RecordError, TemplateError: as in `prepare`.
    """
    encoder = BlockEncoder(tokenizer, settings)
    shown, forms = 0, Counter[tuple[str, str]]()
    for block in read_blocks(settings.paths, 1 << 16, settings.limit):
        chunk = encoder.encode(block)
        forms.update({(block.file, name): count for name, count in chunk.info.forms.items()})
        begin = 0
        for line, length, source in zip(
            chunk.lines.tolist(), chunk.lengths.tolist(), chunk.sources.tolist(), strict=True
        ):
            tokens = slice(begin, begin + length)
            sample = render_sample(chunk.ids[tokens], chunk.loss[tokens], tokenizer)
            yield f"{block.file}, line {line}, source {chunk.info.sources[source]!r}: {sample}"
            begin, shown = begin + length, shown + 1
            if shown == count:
                break
        if shown == count:
            break
    if not shown:
        raise RecordError(settings.paths[0], 1, "", "no record of the input is left to train on")
    said = describe_forms((file, name, records) for (file, name), records in forms.items())
    yield "\n".join(f"of the records looked at, {line}" for line in said)

"""A process of `prepare`: it encodes blocks, and copies documents to their places in the packs.

It imports neither torch nor transformers. Small inputs need no other process: `answers` serves them in this one.
"""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_idft.data.packed.assembly import place_documents
from megatron_idft.data.packed.blocks import Block
from megatron_idft.data.packed.chunks import write_chunk
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.worker_tokenizer import rebuild_tokenizer
from megatron_idft.data.reference.reader import ReferenceReader
from megatron_idft.errors import RecordError, TemplateError
from megatron_idft.processes import serve

REFERENCE_FOLDER = "reference"  # in that of the chunks
Answer = Callable[[dict[str, Any], bytes], dict[str, Any]]


def load(path: str) -> Answer:
    """A worker's answers to its tasks.

    Args:
        path: of the file that `tasks.encoding_processes` has written.
    """
    setup = json.loads(Path(path).read_text(encoding="utf-8"))
    settings, folder = PrepareSettings.from_json(setup["settings"]), Path(setup["folder"])
    tokenizer = rebuild_tokenizer(setup["tokenizer"], Path(path).parent)
    encoder = BlockEncoder(tokenizer, settings, reference_reader(settings, folder))
    gc.freeze()  # the tokenizer lives as long as the process: no collection need look at it
    gc.set_threshold(10_000)  # nor at every few records: they are many small objects, none of which refers to itself
    return answers(encoder, folder)


def reference_reader(settings: PrepareSettings, folder: Path) -> ReferenceReader | None:
    """Of the numbers of the reference model; None where the settings name none.

    Args:
        settings: of the output.
        folder: of the chunks.
    """
    if settings.reference is None:
        return None
    return ReferenceReader(settings.reference, settings.paths, folder / REFERENCE_FOLDER)


def answers(encoder: BlockEncoder, folder: Path) -> Answer:
    """The answer to the (header, payload) of a task.

    Args:
        encoder: of the records.
        folder: of the chunks.
    """

    def answer(header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        begin = time.process_time()
        try:
            reply = place(header) if header["do"] == "place" else encode(header, payload)
        except RecordError as error:
            return {"error": "record", "values": list(error.parts().values())}
        except TemplateError as error:
            return {"error": "template", "values": [str(error)]}
        except OSError as error:
            return {"error": "system", "values": [str(error)]}
        return reply | {"cpu_seconds": time.process_time() - begin, "peak_bytes": _peak_bytes()}

    def place(header: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": place_documents(Path(header["building"]), folder, header)}

    def encode(header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        error = header["error"]
        block = Block(**header["block"], data=payload, error=None if error is None else RecordError(**error))
        chunk = encoder.encode(block)
        write_chunk(folder, chunk)
        return {"tokens": chunk.info.tokens, "records": chunk.info.counts.records}

    return answer


def _peak_bytes() -> int:
    # Not getrusage: there the memory of the process that started this one counts, too.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    serve(load)

"""One process of `prepare`: `python -P -m megatron_idft.data.packed.worker FD SETUP`.

Started by workers.py, never by hand. It answers messages over the connection FD until that closes. SETUP is a JSON file
with the tokenizer, the settings and the folder of the chunks.
"""

import gc
import json
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_idft.data.packed.assembly import place_documents
from megatron_idft.data.packed.blocks import Block
from megatron_idft.data.packed.chunks import write_chunk
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.worker_tokenizer import rebuild_tokenizer
from megatron_idft.errors import RecordError, TemplateError


class _Encoder:
    def __init__(self, setup: Path):
        values = json.loads(setup.read_text(encoding="utf-8"))
        settings = PrepareSettings(**values["settings"] | {"paths": tuple(values["settings"]["paths"])})
        self._folder = Path(values["folder"])
        self._encoder = BlockEncoder(rebuild_tokenizer(values["tokenizer"], setup.parent), settings)

    def answer(self, header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        if header["do"] == "place":
            return {"tokens": place_documents(Path(header["building"]), self._folder, header)}
        error = header["error"]
        block = Block(**header["block"], data=payload, error=None if error is None else RecordError(**error))
        chunk = self._encoder.encode(block)
        write_chunk(self._folder, chunk)
        return {"tokens": chunk.info.tokens, "records": chunk.info.counts.records}


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        encoder = _Encoder(Path(sys.argv[2]))
    except Exception:
        connection.send_bytes(json.dumps({"error": "crash", "values": {"text": traceback.format_exc()}}).encode())
        return
    gc.freeze()  # the tokenizer lives as long as the process: no collection need look at it
    gc.set_threshold(10_000)  # nor at every few records: they are many small objects, none of which refers to itself
    connection.send_bytes(b"{}")
    while True:
        try:
            header, payload = json.loads(connection.recv_bytes()), connection.recv_bytes()
        except EOFError:
            return
        begin = time.process_time()
        try:
            reply = encoder.answer(header, payload)
        except Exception as error:
            reply = _described(error)
        seconds = time.process_time() - begin
        reply |= {"index": header["index"], "cpu_seconds": seconds, "peak_bytes": _peak_bytes()}
        try:
            connection.send_bytes(json.dumps(reply).encode())
        except BrokenPipeError:
            return


def _peak_bytes() -> int:
    # Not getrusage: there the memory of the process that started this one counts, too.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, RecordError):
        keys = ("file", "line", "field", "message", "raw")
        return {"error": "record", "values": {key: getattr(error, key) for key in keys}}
    if isinstance(error, TemplateError):
        return {"error": "template", "values": {"text": str(error)}}
    if isinstance(error, OSError):
        return {"error": "system", "values": {"text": str(error)}}
    return {"error": "crash", "values": {"text": traceback.format_exc()}}


if __name__ == "__main__":
    main()

"""Conversations -> packs, in two passes.

The first tokenizes: the input is cut into chunks of about as many bytes, whose bounds do not depend on who works on
them, and each process turns one chunk after the other into arrays in `PREFIX.chunks/`. A chunk's files appear when they
are whole, so a run that was stopped or killed goes on after its last finished chunks; a manifest refuses to mix
settings. The second packs: only lengths decide which documents share a pack, then the processes copy every document to
its place. So neither the number of processes nor interruptions show in the bytes. `PREFIX.json` appears last.

Held in memory: a chunk in each process, and about 60 bytes for each document in this one while it packs. On disk the
chunks need as much space as the packs, until they are deleted.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_idft.corpus.ledger.files import finished_parts, plain_errors
from megatron_idft.corpus.ledger.manifest import agree
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed import summary
from megatron_idft.data.packed.assembly import Assembly, positions
from megatron_idft.data.packed.blocks import Block, read_blocks
from megatron_idft.data.packed.chunks import ChunkInfo, is_finished, read_info
from megatron_idft.data.packed.encoding_process import REFERENCE_FOLDER
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.store import FORMAT, PackedStore, companion
from megatron_idft.data.packed.tasks import Workers, encoding_workers, run_tasks
from megatron_idft.data.reference.reader import prepare_scores
from megatron_idft.data.reference.settings import Scores, open_scores
from megatron_idft.errors import InputError, PrepareError, RecordError, SettingsMismatch, UserError
from megatron_idft.processes import Task
from megatron_idft.progress import byte_bar


@dataclass(slots=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        store: the packs.
        report: its text.
        chunks: that this run tokenized.
        resumed_chunks: that were there already.
        tokens: of `chunks`.
        cpu_seconds: processor time of the worker processes, once started.
        peak_worker_bytes: the most memory that one of them held.
    """

    store: PackedStore
    report: str
    chunks: int = 0
    resumed_chunks: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    peak_worker_bytes: int = 0


def prepare(
    settings: PrepareSettings,
    tokenizer: ChatTokenizer,
    output: str | Path,
    *,
    workers: int | None = None,
    keep_chunks: bool = False,
    progress: bool = True,
) -> Prepared:
    """Write the packs of these records to `output`, a prefix of file names, or open them if they are there.

    Args:
        settings: of the output.
        tokenizer: of the records.
        output: the prefix.
        workers: processes; None: one for each processor that this one may use; 0: none beside this one.
        keep_chunks: leave PREFIX.chunks in place.
        progress: show a bar.

    Raises:
        RecordError: a bad record; names file, line and field.
        TemplateError: the chat template does not prove the loss mask.
        SettingsMismatch: `output` was begun with other settings.
        InputError: `output` belongs to something else, or no record is left.
        PrepareError: a process died, or the disk is full.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 0:
        raise InputError(f"workers must not be negative, got {workers}")
    prefix, folder = Path(output), companion(output, ".chunks")
    read_blocks(settings.paths, settings.chunk_bytes)  # for its checks of the files
    fingerprint = tokenizer.fingerprint()
    scores = None
    if settings.reference is not None:
        scores = open_scores(settings.reference.scores)
        scores.require(fingerprint, settings.reference.columns)
    described = settings.of_packs(fingerprint)
    if companion(prefix, ".json").exists():
        store = _open_finished(prefix, settings.of_packs(fingerprint))
        if folder.exists() and not keep_chunks:
            shutil.rmtree(folder)
        return Prepared(store, summary.read(prefix))
    if not folder.exists() and (taken := [s for s in (".bin", ".idx") if companion(prefix, s).exists()]):
        raise InputError(
            f"{companion(prefix, taken[0])} is there, but no {companion(prefix, '.json').name} beside it: it was not "
            "written by prepare. Name another --output, or remove it"
        )
    with plain_errors(prefix.parent, "write packs", foreign_code=True):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            job = {"settings": settings.of_chunks(fingerprint), "num_chunks": None, "part_suffix": ".json"}
            agree(folder, folder, f"{os.getpid()}", job)
            with _removed_unless_begun(folder), ExitStack() as stack:
                if settings.reference is not None:
                    prepare_scores(settings.reference, settings.paths, folder / REFERENCE_FOLDER)
                pool = stack.enter_context(closing(encoding_workers(workers, tokenizer, settings, folder)))
                run = _Run(settings, prefix, folder, pool, progress, scores)
                infos = run.tokenize()
                if settings.of_packs(fingerprint) != described:
                    raise PrepareError(
                        f"{', '.join(_read_from(settings))}: a file changed while it was read. Remove {folder}, if it"
                        " is there, and start again"
                    )
                prepared = run.pack(infos, tokenizer, described)
        if not keep_chunks:
            shutil.rmtree(folder)
    return prepared


class _Run:
    def __init__(
        self,
        settings: PrepareSettings,
        prefix: Path,
        folder: Path,
        workers: Workers,
        progress: bool,
        scores: Scores | None,
    ):
        self._settings, self._prefix, self._folder, self._scores = settings, prefix, folder, scores
        self._workers, self._progress = workers, progress
        self._figures: dict[str, Any] = {"chunks": 0, "resumed_chunks": 0, "tokens": 0, "cpu_seconds": 0.0}
        self._figures["peak_worker_bytes"] = 0

    def tokenize(self) -> list[ChunkInfo]:
        """Finish every chunk."""
        figures = self._figures
        disk_bytes: dict[int, int] = {}
        total = sum(Path(path).stat().st_size for path in self._settings.paths)
        count = records = 0

        def tasks() -> Iterator[Task]:
            nonlocal count
            for block in read_blocks(self._settings.paths, self._settings.chunk_bytes, self._settings.limit):
                count = block.index + 1
                if is_finished(self._folder, block.index):
                    errors = read_info(self._folder, block.index).errors
                    if errors and self._settings.bad_records == "stop":  # they were skipped before
                        raise RecordError(**errors[0])
                    figures["resumed_chunks"] += 1
                    bar.update(block.disk_bytes)
                    if self._progress:
                        bar.initial += block.disk_bytes  # cost no time: not to be counted in the rate
                    continue
                disk_bytes[block.index] = block.disk_bytes
                yield Task(block.index, _header(block), block.data, f"{block.file} from line {block.first} on")

        with byte_bar("tokenizing", total, self._progress, "B") as bar:
            for task, reply in run_tasks(self._workers, tasks()):
                figures["chunks"] += 1
                figures["tokens"] += reply["tokens"]
                self._note(reply)
                records += reply["records"]
                elapsed = max(bar.format_dict["elapsed"], 1e-9) if self._progress else 1.0
                rate = f"{records:,} records, {figures['tokens'] / elapsed:,.0f} tokens/s"
                bar.set_postfix_str(rate, refresh=False)
                bar.update(disk_bytes.pop(task.number))
        return [read_info(self._folder, index) for index in range(count)]

    def pack(self, infos: list[ChunkInfo], tokenizer: ChatTokenizer, described: dict[str, Any]) -> Prepared:
        """Write the packs of all chunks."""
        counts = summary.total(infos)
        if not counts.kept:
            raise InputError(_nothing_left(infos, self._settings))
        assembly = Assembly(self._folder, infos, self._settings)
        numbers = summary.numbers(infos, self._settings)
        if self._scores is not None:
            numbers["reference"] = summary.reference_numbers(infos, self._scores.model)
        if self._settings.packing:
            sizes = positions(assembly.lengths, self._settings.pad_multiple)
            numbers |= summary.packing_numbers(sizes, len(assembly.packs), self._settings.seq_length)
        assembly.write_index()
        assembly.write_origins()
        with byte_bar("packing", assembly.tokens, self._progress, " tokens") as bar:
            for _, reply in run_tasks(self._workers, assembly.place_tasks()):
                bar.update(reply["tokens"])
                self._note(reply)
        description = {
            "kind": "megatron-idft packs",
            "format": FORMAT,
            "settings": described,
            "seq_length": self._settings.seq_length,
            "pad_multiple": self._settings.pad_multiple,
            "packs": len(assembly.packs),
            "documents": len(assembly.lengths),
            "tokens": assembly.tokens,
            "weighted": assembly.weighted,
            **({"weights": numbers["weights"]} if "weights" in numbers else {}),
            "chat_template": tokenizer.template.source,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "end_of_turn_ids": sorted({i for info in infos for i in info.end_ids}),
            "largest_id": _largest_id(infos),
            "counts": asdict(counts),
            "sources": assembly.sources,
            "files": list(self._settings.paths),
        }
        if self._scores is not None:
            description["reference"] = (
                described["reference"] | numbers["reference"] | {"recorded": dict(self._scores.recorded)}
            )
        others = {".report.json": _json(numbers)}
        others[".report.txt"] = (summary.text(numbers, self._prefix.name) + "\n").encode()
        if counts.bad:
            lines = [json.dumps(error, ensure_ascii=False) for info in infos for error in info.errors]
            others[".errors.jsonl"] = ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
        assembly.publish(self._prefix, others, _json(description))
        return Prepared(PackedStore(self._prefix), summary.text(numbers, str(self._prefix)), **self._figures)

    def _note(self, reply: dict[str, Any]) -> None:
        self._figures["cpu_seconds"] += reply["cpu_seconds"]
        self._figures["peak_worker_bytes"] = max(self._figures["peak_worker_bytes"], reply["peak_bytes"])


def _read_from(settings: PrepareSettings) -> list[str]:
    return [*settings.paths, *([settings.reference.scores] if settings.reference else [])]


def _nothing_left(infos: list[ChunkInfo], settings: PrepareSettings) -> str:
    counts, files = summary.total(infos), ", ".join(settings.paths[:3]) + (" …" if len(settings.paths) > 3 else "")
    why = "pass a longer --seq-length, or records with trained turns"
    if not counts.records:
        why = "the files hold none"
    elif counts.bad == counts.records:
        why = f"every one is bad; the first: {next(RecordError(**e) for info in infos for e in info.errors)}"
    empty = summary.text(summary.numbers(infos, settings), "", written=False)
    return f"{files}: no record is left to train on: {why}\n{empty}"


def _largest_id(infos: list[ChunkInfo]) -> int | None:
    """None where some chunk does not say; `require_rows` then looks at the packs."""
    known = [info.largest_id for info in infos if info.largest_id is not None]
    return max(known) if known and len(known) == len(infos) else None


def _header(block: Block) -> dict[str, Any]:
    keys = ("index", "file", "file_number", "stem", "first")
    error = None if block.error is None else block.error.parts()
    return {"do": "encode", "block": {key: getattr(block, key) for key in keys}, "error": error}


def _open_finished(prefix: Path, wanted: dict[str, Any]) -> PackedStore:
    store = PackedStore(prefix)
    wanted, there = json.loads(json.dumps(wanted)), store.meta["settings"]
    keys = sorted(wanted.keys() | there.keys())
    differences = {key: (there.get(key), wanted.get(key)) for key in keys if there.get(key) != wanted.get(key)}
    if differences:
        raise SettingsMismatch(companion(prefix, ".json"), differences)
    return store


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"another prepare is at work in {folder}: wait for it, or stop it") from None
        except OSError as error:  # a file system without locks: two at once write the same bytes
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


@contextmanager
def _removed_unless_begun(folder: Path) -> Iterator[None]:
    """Where the input is refused before a chunk is finished: the mended input is another one, for the same output."""
    try:
        yield
    except UserError:
        if not finished_parts(folder, ".json"):
            shutil.rmtree(folder)
        raise


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

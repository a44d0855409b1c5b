"""Blocks to encode and documents to place, given to processes; and how their failures end `prepare`."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.encoding_process import answers, reference_reader
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.worker_tokenizer import describe_tokenizer
from megatron_idft.errors import PrepareError, RecordError, TemplateError
from megatron_idft.processes import Failure, ProcessPool, Task


class Workers(Protocol):
    """Who works on tasks: a `ProcessPool`, or this process."""

    def run(self, tasks: Iterable[Task], /) -> Iterator[tuple[Task, Any]]: ...
    def close(self) -> None: ...


class ThisProcess:
    """The work of the processes done in this one: before a process has started, a small input is tokenized."""

    def __init__(self, tokenizer: ChatTokenizer, settings: PrepareSettings, folder: Path):
        self._answer = answers(BlockEncoder(tokenizer, settings, reference_reader(settings, folder)), folder)

    def run(self, tasks: Iterable[Task], /) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            yield task, self._answer(task.header, task.payload)

    def close(self) -> None:
        pass


def encoding_workers(count: int, tokenizer: ChatTokenizer, settings: PrepareSettings, folder: Path) -> Workers:
    """Up to `count` processes; 0: this one.

    Args:
        count: of processes.
        tokenizer: of the records.
        settings: of the output.
        folder: of the chunks; a file in it has the settings that every process begins with.
    """
    if count == 0:
        return ThisProcess(tokenizer, settings, folder)
    setup = folder / "setup.json"
    values = {"tokenizer": describe_tokenizer(tokenizer), "settings": asdict(settings), "folder": str(folder)}
    setup.write_text(json.dumps(values), encoding="utf-8")
    not_started = partial(_error, when="while starting")
    return ProcessPool("megatron_idft.data.packed.encoding_process", str(setup), count, not_started=not_started)


def run_tasks(workers: Workers, tasks: Iterator[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Each task with its reply, as they come. Tasks have rising numbers, and are taken as they are needed.

    Where tasks fail, those before the first that failed are finished, and its error is raised: the same one whatever
    the number of processes.

    Raises:
        PrepareError: a process died.
    """
    failed: dict[int, Exception] = {}

    def until_one_fails() -> Iterator[Task]:
        while not failed and (task := next(tasks, None)) is not None:
            yield task

    for task, reply in workers.run(until_one_fails()):
        if isinstance(reply, Failure):
            failed[task.number] = _error(reply, f"on {task.label}")
            if reply.end is not None:
                raise failed[task.number]
        elif "error" in reply:
            failed[task.number] = _ERRORS[reply["error"]](*reply["values"])
        else:
            yield task, reply
    if failed:
        raise failed[min(failed)]


def _error(failure: Failure, when: str) -> Exception:
    if failure.traceback:
        return RuntimeError(f"in a worker process:\n{failure.traceback}")
    how = f"ended by itself ({failure.end})" if failure.end else failure.reason
    remedy = "if memory ran out, let fewer processors work. Start the same command again"
    return PrepareError(f"a worker process {how} {when}; {remedy}")


def _system_error(text: str) -> PrepareError:
    return PrepareError(f"{text}; mend it and start the same command again")


_ERRORS: dict[str, Callable[..., Exception]] = {
    "record": RecordError,
    "template": TemplateError,
    "system": _system_error,
}

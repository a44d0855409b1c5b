"""A chat template tried in a process that can be killed, before it is compiled and rendered in this one.

Templates are programs of other people. One that never ends, or writes without end, would hold a training for ever: some
do so while they are compiled, where constants are folded. Here each is compiled, and renders short conversations, under
a limit of time and memory. Templates that behave well here and run wild on other conversations meet the limits of
`ChatTemplate`.
"""

import datetime
import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_idft.corpus.messages import Message
from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.errors import EndlessTemplateError, TemplateError, WorkerError
from megatron_idft.processes import Failure, ProcessPool, Task, serve

SECONDS, MEMORY_MB = 20.0, 2048
_IDLE_SECONDS = 10.0  # until the process ends; another template may follow
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
_TURNS: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
_CONVERSATIONS: list[tuple[list[Message], list[dict[str, Any]] | None]] = [
    (_TURNS[:1], None),
    ([{"role": "system", "content": "system"}, *_TURNS * 3], None),
    (
        [
            _TURNS[0],
            {"role": "assistant", "content": "", "reasoning_content": "thought", "tool_calls": [_CALL]},
            {"role": "tool", "content": "1", "name": "add"},
            _TURNS[1],
        ],
        _TOOLS,
    ),
]


def try_template(source: str, variables: Mapping[str, Any], date: datetime.date | None) -> None:
    """Run the template; other faults than an endless one are not looked at here.

    Raises:
        TemplateError: the template does not end.
    """
    settings = {"variables": dict(variables), "date": None if date is None else date.isoformat()}
    reason = _trial(source, json.dumps(settings, default=str))
    if reason is not None:
        raise TemplateError(
            f"the chat template does not end on a short conversation: {reason} (limits: {SECONDS:g} s, {MEMORY_MB} MB)."
            " Look for endless loops and huge texts in it, or give another one with --chat-template FILE"
        )


def render_all(task: tuple[str, dict[str, Any]], _: bytes) -> None:
    """In the process that may be killed: compile the template and render with it, if that ends at all."""
    source, values = task
    date = None if values["date"] is None else datetime.date.fromisoformat(values["date"])
    try:
        template = ChatTemplate(source, values["variables"], date)
    except TemplateError:
        return
    for messages, tools in _CONVERSATIONS:
        for prompt in (False, True):
            try:
                template.render(messages, tools=tools, add_generation_prompt=prompt)
            except EndlessTemplateError:
                raise
            except ValueError as error:  # it rejects this conversation, or fails
                if isinstance(error.__cause__, MemoryError):
                    raise MemoryError from None


class _Trials:
    """One process for all templates, ended when none has come for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._timer: threading.Timer | None = None

    def run(self, task: Task) -> Failure | None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._pool is None:
                self._pool = ProcessPool(
                    __name__, None, 1, not_started=_not_started, seconds=SECONDS, memory_mb=MEMORY_MB
                )
            failure: Failure | None
            [(_, failure)] = self._pool.run([task])
            self._timer = threading.Timer(_IDLE_SECONDS, self._close)
            self._timer.daemon = True
            self._timer.start()
            return failure

    def _close(self) -> None:
        with self._lock:
            if self._pool is not None and self._timer is threading.current_thread():
                self._pool.close()
                self._pool = None


def _not_started(failure: Failure) -> WorkerError:
    return WorkerError(f"the process that tries chat templates: {failure.reason}; is there memory left?")


_TRIALS = _Trials()


@lru_cache(maxsize=256)
def _trial(source: str, settings: str) -> str | None:
    failure = _TRIALS.run(Task(0, [source, json.loads(settings)]))
    return None if failure is None else failure.reason


if __name__ == "__main__":
    serve(lambda _: render_all)

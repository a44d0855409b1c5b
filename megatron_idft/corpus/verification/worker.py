"""One process that compares answers: `python -P -m megatron_idft.corpus.verification.worker FD SETTINGS`.

Started by pool.py, never by hand. It answers JSON messages over the connection FD and imports neither torch nor
Megatron by itself. SETTINGS is JSON: plugin, timeout_seconds, memory_mb.
"""

import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

MAX_REASON = 500  # characters
GRACE_SECONDS = 5  # beyond the time limit, after which a worker ends itself should nobody be there to kill it

Reply = dict[str, Any]
Check = Callable[[Any, Any], Reply]


def load_plugin(spec: str) -> Check:
    """Raises ValueError where `module:function` names no function."""
    module_name, _, attribute = spec.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} ({error}); put its folder on PYTHONPATH") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} ({module.__file__}) has no function {attribute!r}")

    def check(response: str, reference: Any) -> Reply:
        result = function(response, reference)
        if result is None:
            return {"verdict": "unknown", "reason": f"{spec} could not tell"}
        if not isinstance(result, bool):
            name = type(result).__name__
            return {"verdict": "unknown", "reason": f"{spec} returned {name}; it must return True, False or None"}
        return {"verdict": "right" if result else "wrong"}

    return check


def load_math_verify() -> Check:
    """math-verify without time limits of its own: they are signals, and do not stop everything."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def check(answer: str, reference: str) -> Reply:
        read = []
        for text in (reference, answer):
            found = parse(f"${text}$", parsing_timeout=None, raise_on_error=True)
            if all(isinstance(value, str) for value in found):
                return {"verdict": "unknown", "reason": f"math-verify cannot read {text[:100]!r}"}
            read.append(found)
        same = verify(*read, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        return {"verdict": "right" if same else "wrong"}

    check("x+1", "1+x")  # compiles its patterns and tables, which should not count as the time of the first answer
    return check


def main(descriptor: int, settings: dict[str, Any]) -> None:
    os.set_inheritable(descriptor, False)  # not for programs that a plug-in starts
    connection = Connection(descriptor)
    memory = settings["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    reason = f"ran out of memory, {settings['memory_mb']} MB"
    out_of_memory = json.dumps({"verdict": "unknown", "reason": reason, "last": True}).encode()
    try:
        check = load_plugin(settings["plugin"]) if settings["plugin"] else load_math_verify()
    except BaseException as error:
        connection.send_bytes(json.dumps({"error": _reason(error)}).encode())
        return
    connection.send_bytes(b"{}")
    while True:
        try:
            task = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.alarm(math.ceil(settings["timeout_seconds"]) + GRACE_SECONDS)
        try:
            reply = json.dumps(check(*task)).encode()
        except MemoryError:
            connection.send_bytes(out_of_memory)
            return  # what a failed allocation left behind may be broken
        except BaseException as error:
            reply = json.dumps({"verdict": "unknown", "reason": _reason(error)}).encode()
        signal.alarm(0)
        connection.send_bytes(reply)


def _reason(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # of an exception class of the plug-in
        text = ""
    return f"{type(error).__name__}: {text}"[:MAX_REASON]


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))

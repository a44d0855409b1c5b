"""An interpreter for tests that forks where another would start: `launch.forking_python()` writes a script around it.

Standard library alone. Asks a server of zygote.py for a process with this one's arguments, environment, folder,
network and standard streams, passes signals on to it and ends as it does: with its exit code, or by its signal. When
this process is killed, so is the other. What is no program (`-m pip`, flags of the interpreter) goes to the real one.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

SIZE = struct.Struct("!I")
STATUS = struct.Struct("!i")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# With a model or its checkpoint, hence with Megatron; `score report` and the like have none.
MODEL_VERBS = ("train", "score", "realign", "run", "plan", "convert")
FRESH_MODULES = ("pip", "venv", "pytest")


def ask(
    server: str, argv: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[int], python: str
) -> socket.socket:
    """Ask for a process; its STATUS will come, and a byte sent is a signal to it. Closing the connection kills it.

    argv: what follows the interpreter. python: its `sys.executable`.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    request = {"argv": list(argv), "environment": dict(environment), "folder": folder, "python": python}
    content = json.dumps(request).encode()
    network = os.open("/proc/self/ns/net", os.O_RDONLY)
    descriptors = array.array("i", [*streams, network])
    connection.sendmsg([SIZE.pack(len(content))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    os.close(network)
    connection.sendall(content)
    return connection


def status(connection: socket.socket) -> int:
    """Wait for the end: the exit code, or the signal's number below 0 (also where the server has died)."""
    answer = connection.recv(STATUS.size, socket.MSG_WAITALL)
    return STATUS.unpack(answer)[0] if len(answer) == STATUS.size else -signal.SIGKILL


def needs_megatron(argv: Sequence[str]) -> bool:
    words = [word for word in argv if word != "-u"]
    return words[:2] == ["-m", "megatron_idft"] and words[2:3] != [] and words[2] in MODEL_VERBS and _has_model(words)


def _has_model(words: Sequence[str]) -> bool:
    return words[2] in ("run", "convert") or words[3:4] == [] or words[3].startswith("--")


def _is_program(argv: Sequence[str]) -> bool:
    words = argv[1:] if argv[:1] == ["-u"] else argv
    if words[:1] == ["-m"]:
        return len(words) > 1 and words[1] not in FRESH_MODULES
    return bool(words) and (words[0] in ("-c", "-") or not words[0].startswith("-"))


def main(real: str, servers: Mapping[str, str], checkout: str, interpreted: str) -> None:
    """servers: those of zygote.py by name. checkout: whose package the one with Megatron has imported.

    interpreted: TRITON_INTERPRET when they imported Triton, whose own functions obey it at that moment.
    """
    argv = sys.argv[1:]
    if not _is_program(argv) or os.environ.get("TRITON_INTERPRET", interpreted) != interpreted:
        os.execv(real, [real, *argv])
    if "TORCHELASTIC_RUN_ID" in os.environ:  # as the rank itself would, if it were a child of its agent
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG in <sys/prctl.h>
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    name = "megatron" if needs_megatron(argv) and first == checkout else "python"
    connection = ask(servers[name], argv, os.environ, os.getcwd(), (0, 1, 2), os.path.abspath(sys.argv[0]))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    code = status(connection)
    if code >= 0:
        os._exit(code)
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)

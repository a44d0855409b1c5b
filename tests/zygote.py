"""Processes that have imported what costs seconds, and fork programs that ask for it over a socket (forking_client.py).

Started by launch.py: `python -P zygote.py PYTHON_SOCKET MEGATRON_SOCKET`. One server has the libraries of others alone;
the second, forked from it, also Megatron in CPU mode. Both end when stdin does, and their programs with them.

A program sees what a fresh process would: arguments, environment, sys.path, `__main__`, streams, threads. Only the
order of imports is not under test here: test_run.py, test_train.py, cluster and faults start fresh ones.
"""

import argparse
import array
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import queue
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from contextlib import suppress

from forking_client import SIZE, STATUS

# Where a fresh process finds modules, behind its program's folder and its PYTHONPATH.
INSTALLED = [path for path in sys.path if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]


COMMON = """
    pyarrow.parquet sentencepiece torch torch._dynamo torch._inductor.utils torch.distributed.checkpoint torch.onnx
    torch.utils.tensorboard wandb transformers.modeling_utils transformers.models.auto
    transformers.tokenization_utils_tokenizers
"""
# What programs without Megatron need: torchrun, pictures, a model of the examples in transformers.
OTHERS = """
    matplotlib.figure matplotlib.backends.backend_agg transformers.models.qwen2.modeling_qwen2 torch.distributed.run
    torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
"""
# What nearly every rank needs, and would spend most of its short life on importing.
MEGATRON = """
    megatron.core.models.gpt.gpt_model megatron.core.models.hybrid.hybrid_model megatron.core.tokenizers.text
    megatron.training.training
    megatron_idft.integration.training.program megatron_idft.integration.offline.score
    megatron_idft.integration.offline.realign
"""


def import_all(names: str) -> None:
    for name in names.split():
        with contextlib.suppress(ModuleNotFoundError):  # of another release; a program then imports what it needs
            importlib.import_module(name)


def import_megatron() -> None:
    from megatron_idft.integration.platform import cpu

    cpu.enable()
    import_all(MEGATRON)
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import argument_utils, arguments

    # Upstream starts a manager process, which imports torch anew, for a queue that only --async-save shares.
    filesystem_async._results_queue = queue.Queue()
    # Upstream parses its own source for the help texts of its flags; every program would do so anew.
    factory = argument_utils.ArgumentGroupFactory
    read = functools.partial(factory._get_field_docstrings, factory.__new__(factory))
    factory._get_field_docstrings = staticmethod(functools.cache(read))
    arguments.add_megatron_arguments(argparse.ArgumentParser())


# ------------------------------------------------------------------------------------------------------------- serving


class Server:
    """Forks a program for each connection, passes signals on to it, and tells its end."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._poll = select.poll()
        self._poll.register(0, select.POLLHUP)
        self._poll.register(listening, select.POLLIN)
        self._programs: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor of the process
        self._asking: dict[int, int] = {}  # that of a connection -> that of its process

    def serve(self) -> None:
        """Until stdin ends."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == 0:
                    os._exit(0)  # the programs die with this process
                elif descriptor == self._listening.fileno():
                    self._start()
                elif descriptor in self._programs:
                    self._end(descriptor)
                elif descriptor in self._asking:
                    self._pass_on(self._asking[descriptor])

    def _start(self) -> None:
        connection, _ = self._listening.accept()
        received = receive(connection)
        if received is None:
            connection.close()
            return
        request, descriptors = received
        pid = os.fork()
        if pid == 0:
            self._close()
            connection.close()
            os._exit(run(request, descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        process = os.pidfd_open(pid)
        self._programs[process] = (pid, connection)
        self._asking[connection.fileno()] = process
        self._poll.register(process, select.POLLIN)
        self._poll.register(connection, select.POLLIN)

    def _pass_on(self, process: int) -> None:
        pid, connection = self._programs[process]
        try:
            number = connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not number:
            self._poll.unregister(connection)
            del self._asking[connection.fileno()]
        send = os.killpg if os.getpgid(pid) == pid else os.kill
        send(pid, number[0] if number else signal.SIGKILL)

    def _end(self, process: int) -> None:
        pid, connection = self._programs.pop(process)
        self._poll.unregister(process)
        os.close(process)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if self._asking.pop(connection.fileno(), None) is not None:
            self._poll.unregister(connection)
        with suppress(OSError):
            connection.sendall(STATUS.pack(code))
        connection.close()

    def _close(self) -> None:
        self._listening.close()
        for process, (_, connection) in self._programs.items():
            os.close(process)
            connection.close()


def receive(connection: socket.socket) -> tuple[dict, list[int]] | None:
    descriptors = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(SIZE.size, socket.CMSG_SPACE(4 * descriptors.itemsize))
    for _, _, content in ancillary:
        descriptors.frombytes(content)
    content = connection.recv(SIZE.unpack(header)[0], socket.MSG_WAITALL) if header else b""
    try:
        return json.loads(content), list(descriptors)
    except ValueError:  # who asked is dead
        for descriptor in descriptors:
            os.close(descriptor)
        return None


# ------------------------------------------------------------------------------------------------------------- forked


def run(request: dict, descriptors: list[int]) -> int:
    """Become the program; returns its exit code."""
    os.setsid()  # a signal to this group reaches what the program forks, and nobody else
    die_with_parent()
    become(request, descriptors)
    code = 0
    try:
        execute(request["argv"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        if not isinstance(leaving.code, int | None):
            print(leaving.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):
            stream.flush()
    return code & 0xFF


def die_with_parent() -> None:
    """signals.py has it too, but the first server imports nothing of this package: a program may have another copy."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG in <sys/prctl.h>


def become(request: dict, descriptors: list[int]) -> None:
    """Environment, folder, streams, network and threads of who asked."""
    *streams, network = descriptors
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if not os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        os.setns(network, os.CLONE_NEWNET)
    os.close(network)
    environment = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    sys.executable = request["python"]
    unbuffered = request["argv"][:1] == ["-u"] or bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=unbuffered or os.isatty(1))
    if environment.get("PYTHONWARNINGS"):
        warnings._processoptions(environment["PYTHONWARNINGS"].split(","))
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def execute(argv: list[str]) -> None:
    """As `python ARGV` would."""
    words = argv[1:] if argv[:1] == ["-u"] else argv
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*map(os.path.abspath, paths), *INSTALLED]
    sys.path_importer_cache.clear()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(words[1])
    elif words[0] in ("-c", "-"):
        sys.argv = [words[0], *words[2:]] if words[0] == "-c" else list(words)
        sys.path.insert(0, "")
        text = words[1] if words[0] == "-c" else sys.stdin.read()
        exec(compile(text, "<string>" if words[0] == "-c" else "<stdin>", "exec"), main.__dict__)
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        path = main.__dict__["__file__"] = os.path.abspath(words[0])
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec")
        exec(code, main.__dict__)


def bind(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    return listening


if __name__ == "__main__":
    python, megatron = map(bind, sys.argv[1:])
    print("listening", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_all(COMMON)
        if os.fork() == 0:
            die_with_parent()
            import_megatron()
            python = megatron
        else:
            import_all(OTHERS)
    gc.freeze()
    Server(python).serve()

"""Runs programs with the real Transformer Engine, whose kernels are torch's (kernels.py); started by running.py.

Reads one JSON object per line, {"argv": [script or "-m", …], "variables": [{…} for each rank], "output": FILE}, forks a
process per rank out of what it has imported, and answers with the list of exit codes. The last line of an output tells
which kernels were called, and what for attention was chosen. CPU mode is that of all tests,
but Transformer Engine is not hidden, its flags are not refused, and where it asks for a GPU, it hears of an H100.
Nobody else does.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

warnings.filterwarnings("ignore")
os.environ |= {"NVTE_PLUGIN": "tests.te.kernels", "NVTE_MASKED_SOFTMAX_FUSION": "0"}

import torch  # noqa: E402

from megatron_idft.integration.platform import cpu, local_flags  # noqa: E402
from tests.te import context_parallel, kernels  # noqa: E402

H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="NVIDIA H100")
ASKING = ("transformer_engine", "megatron.core.extensions.transformer_engine", "megatron.training.initialize")
# What the forks would import one by one.
IMPORTED = """
    megatron.core.models.gpt.gpt_model megatron.core.models.hybrid.hybrid_model megatron.core.tokenizers.text
    megatron.training.training megatron_idft.integration.training.program megatron_idft.integration.offline.score
    pyarrow.parquet torch._dynamo torch._inductor.utils torch.utils.tensorboard transformers.models.auto
"""


def enable() -> None:
    """CPU mode with Transformer Engine in it."""
    cpu._GPU_LIBRARIES = tuple(name for name in cpu._GPU_LIBRARIES if not name.startswith("transformer_engine"))
    cpu._REFUSED.clear()
    # Beside Transformer Engine's layers programs add one flag on a GPU; the unfused attention is its own, in torch.
    cpu._NEEDED = tuple(
        (flag, value)
        for flag, value in (*cpu._NEEDED, ("--attention-backend", "unfused"))
        if (flag, value) not in local_flags.LOCAL_LAYERS or flag == "--no-gradient-accumulation-fusion"
    )
    cpu.enable()
    cuda: Any = torch.cuda
    cuda.is_available = cpu._to_callers(ASKING, lambda: True, lambda: False)
    cuda.get_device_properties, cuda.get_device_capability = lambda *_: H100, lambda *_: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(cpu._to_callers(("transformer_engine",), lambda _: True, torch.Tensor.is_cuda.__get__))
    for name in IMPORTED.split():
        importlib.import_module(name)
    extension = importlib.import_module("transformer_engine_torch")
    context_parallel.install()
    for name, function in kernels.REPLACED.items():  # Transformer Engine only warns of a plugin that fails
        assert getattr(extension, name) is function, f"{name} is not replaced"


def execute(argv: list[str], output: str, variables: dict[str, str]) -> None:
    """As `python ARGV` would, in a process of its own."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if argv[0] == "-m":
        sys.argv = ["-m", *argv[2:]]
        runpy._run_module_as_main(argv[1])
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(argv[0]))
        main.__dict__["__file__"] = argv[0]
        with open(argv[0], "rb") as file:
            exec(compile(file.read(), argv[0], "exec"), main.__dict__)


def run(argv: list[str], output: str, variables: dict[str, str]) -> int:
    """The exit code."""
    try:
        execute(argv, output, variables)
        return 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # In one piece: the ranks share the file.
        os.write(1, (json.dumps({"kernels": sorted(kernels.CALLED), "attention": kernels.ATTENTION}) + "\n").encode())


def main() -> None:
    enable()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ranks = []
        for variables in request["variables"]:
            pid = os.fork()
            if pid == 0:
                os._exit(run(request["argv"], request["output"], variables))
            ranks.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]), flush=True)


if __name__ == "__main__":
    main()

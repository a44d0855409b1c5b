"""Run a foreign training script with the trainer prepared for the loss."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Sequence

from megatron_idft.integration.platform import launch


def prepare_process(program: str, argv: Sequence[str], force_cpu: bool) -> None:
    """Set `sys.argv` with the flags that this machine needs, choose CPU mode, and make the installed Megatron usable.

    In the order that its imports need.

    Args:
        program: what `sys.argv[0]` shall be.
        argv: the flags.
        force_cpu: use the CPU though a GPU is present.
    """
    sys.argv = [program, *argv]
    alone = launch.be_one_process(program)
    import torch

    from megatron_idft.integration.platform import compatibility

    # Before anything of megatron is imported: a mixture would fail later, and elsewhere.
    origin = compatibility.check_megatron_origin()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"> {origin.describe()}", flush=True)
        if alone:
            print("> one process, on one GPU where there is one; torchrun starts more", flush=True)
    if force_cpu or not torch.cuda.is_available():
        from megatron_idft.integration.platform import cpu

        cpu.enable()
        sys.argv[1:] = cpu.add_flags(sys.argv[1:], os.path.basename(program))
    else:
        from megatron_idft.integration.platform.gpu_libraries import find_gpu_libraries
        from megatron_idft.integration.platform.local_flags import add_local_flags

        sys.argv[1:] = add_local_flags(sys.argv[1:], os.path.basename(program), find_gpu_libraries())
    from megatron_idft.integration.platform import local_layers

    local_layers.install()
    compatibility.repair_compile_helpers()
    compatibility.repair_distributed_optimizer_load()
    compatibility.repair_rope_scaling_factor()


def run_script(path: str, argv: Sequence[str], force_cpu: bool = False) -> None:
    """Run the script at `path` as `__main__`, with the loss flags added to its own.

    The script sees what `python path …` would show it: `sys.argv`, `sys.path[0]` and `__main__` are set before any
    megatron module is imported, so a checkout beside the script wins over an installed wheel, as it would alone.

    Raises:
        FileNotFoundError: there is no such script.
    """
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no script {path}: pass the path of a Python training script to `run`")
    # `python -m` put the working directory there; `python SCRIPT.py` puts the script's folder.
    sys.path[0] = os.path.dirname(path)
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    prepare_process(path, argv, force_cpu)

    from megatron_idft.integration.loss.trainer import TrainerIntegration

    TrainerIntegration().attach()
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, main.__dict__)

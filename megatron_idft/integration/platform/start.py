"""The start of every program of ours: one process or torchrun's, CPU or GPU, and a Megatron that works here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_idft.console import say
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
        say(f"> {origin.describe()}")
        if alone:
            say("> one process, on one GPU where there is one; torchrun starts more")
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

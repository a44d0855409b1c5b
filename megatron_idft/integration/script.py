"""`run`: a foreign training script with the trainer prepared for the loss."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Sequence

from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.trainer import TrainerIntegration
from megatron_idft.integration.platform.start import prepare_process


def run_script(path: str, argv: Sequence[str], force_cpu: bool = False) -> None:
    """Run the script at `path` as `__main__`, with the loss flags added to its own.

    The script sees what `python path …` would show it: `sys.argv`, `sys.path[0]` and `__main__` are set before any
    megatron module is imported, so a checkout beside the script wins over an installed wheel, as it would alone.

    Raises:
        FileNotFoundError: there is no such script.
        ArgumentError: a flag that needs the data and the loss_func of `train`.
    """
    if any(word.partition("=")[0].startswith("--sft-normalization") for word in argv):
        raise ArgumentError(
            "--sft-normalization is a flag of `train`: with `run`, the script's own loss_func says what is summed and"
            " what divides the sum. Drop it and return these two there, or train with `megatron-idft train`"
        )
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

    TrainerIntegration().attach()
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, main.__dict__)

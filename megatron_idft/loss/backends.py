"""Which backend computes the loss, by name."""

from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_idft.loss.autograd import Backend

# A backend is a module with the functions of `autograd.Backend`, imported when it is first used.
_MODULES = {"reference": "megatron_idft.loss.reference", "triton": "megatron_idft.loss.triton_backend"}

_HAS_TRITON = find_spec("triton") is not None


def load_backend(name: str) -> Backend:
    """The backend of this name, as `resolve_backend` returns it."""
    backend: Backend = import_module(_MODULES[name])
    return backend


def resolve_backend(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """The backend that `vocab_parallel_loss(..., backend=name)` uses for logits on `device`.

    "auto" is triton on a CUDA device where the package triton is installed, else reference.

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    device = torch.device(device)
    if name == "auto":
        return "triton" if device.type == "cuda" and _HAS_TRITON else "reference"
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}: choose from auto, {', '.join(_MODULES)}")
    if name == "triton":
        if not _HAS_TRITON:
            raise ValueError("backend 'triton' needs the package triton: pip install triton, or use backend='auto'")
        if device.type != "cuda" and not _runs_interpreted():
            raise ValueError(
                f"backend 'triton' needs logits on a CUDA device, got {device}; use backend='auto' or 'reference' (for "
                "tests, TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly)"
            )
    return name


def _runs_interpreted() -> bool:
    from megatron_idft.loss import triton_backend  # noqa: PLC0415  imports triton

    return triton_backend.INTERPRETED

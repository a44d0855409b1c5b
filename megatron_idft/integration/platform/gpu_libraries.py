"""Finds the libraries whose kernels Megatron uses on a GPU. One answer for the programs and for `doctor`."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_idft.errors import BrokenLibraryError


@dataclass(frozen=True)
class GPULibraries:
    """
    Attributes:
        transformer_engine: whether Megatron will use Transformer Engine.
        why_not: the reason where it is installed and yet not used; empty elsewhere.
        weight_gradient_kernel: apex's `fused_weight_gradient_mlp_cuda`, behind gradient-accumulation fusion.
        softmax_kernel: `scaled_upper_triang_masked_softmax_cuda`, the fused softmax of local attention.
    """

    transformer_engine: bool
    why_not: str = ""
    weight_gradient_kernel: bool = False
    softmax_kernel: bool = False


def installed(distribution: str) -> str | None:
    """Its version, None where it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def find_gpu_libraries(importing: bool = True) -> GPULibraries:
    """Look for them as Megatron does (core/extensions/transformer_engine.py, tensor_parallel/layers.py).

    Args:
        importing: try whether Transformer Engine imports; else only whether it is there.

    Raises:
        BrokenLibraryError: a Transformer Engine that ends Megatron's own import: the package is there, but its part for
            torch is not (core/fp8_utils.py imports it nevertheless), or it fails with anything but ImportError.
    """
    engine, why_not = _transformer_engine() if importing else (_there("transformer_engine"), "")
    kernels = ("fused_weight_gradient_mlp_cuda", "scaled_upper_triang_masked_softmax_cuda")
    return GPULibraries(engine, why_not, *map(_there, kernels))


def _transformer_engine() -> tuple[bool, str]:
    try:
        importlib.import_module("transformer_engine")
    except ImportError as error:
        there = installed("transformer-engine") or installed("transformer-engine-torch")
        return False, _first_line(error) if there else ""
    except Exception as error:
        raise _broken(error) from error
    try:
        importlib.import_module("transformer_engine.pytorch.fp8")
    except Exception as error:
        raise _broken(error) from error
    return True, ""


def _broken(error: Exception) -> BrokenLibraryError:
    return BrokenLibraryError(
        f"Transformer Engine is installed but cannot be imported ({_first_line(error)}), and Megatron imports it"
        " everywhere: install what is missing, or one that was built for this torch and CUDA, or use an NGC PyTorch"
        " container, or pip uninstall transformer-engine to use Megatron's local layers"
    )


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

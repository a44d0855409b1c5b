"""The matrix products of the output head, each summed in fp32."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

_CPU_ROWS = 4096  # of the weight that are fp32 at a time

# total [V, H] fp32 += gradient [n, V]^T hidden [n, H]
AddProduct = Callable[[Tensor, Tensor, Tensor], None]


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, V] fp32 = hidden [n, H] weight [V, H]^T, not rounded to the dtype of hidden and weight."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        hidden = hidden.float()
        for begin in range(0, len(weight), _CPU_ROWS):
            part = weight[begin : begin + _CPU_ROWS].float()
            torch.mm(hidden, part.t(), out=out[:, begin : begin + _CPU_ROWS])


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, H] fp32 += gradient [n, V]^T hidden [n, H], which share a dtype."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.t(), hidden)
    else:
        mixed_product(gradient.device.type, gradient.dtype)[1](total, gradient, hidden)


@cache
def mixed_product(device_type: str, dtype: torch.dtype) -> tuple[str, AddProduct]:
    """(name, function) of the product of 16-bit matrices that adds to fp32: the first that is right here.

    NVIDIA's apex and Transformer Engine have it in one kernel, as Megatron uses it for gradient accumulation fusion.
    Each is asked for a small product before it is trusted with a training.
    """
    if device_type != "cuda":
        return "torch, in fp32", _in_fp32
    for name, find in (("apex", _apex), ("transformer-engine", _transformer_engine), ("torch", lambda: _torch_mixed)):
        try:
            function = find()
            if _is_right(function, device_type, dtype):
                return name, function
        except (ImportError, AttributeError, TypeError, RuntimeError):
            continue  # not installed, or not for this device: the name of the one that is taken is shown
    return "torch, in fp32", _in_fp32


def _apex() -> AddProduct:
    kernels = import_module("fused_weight_gradient_mlp_cuda")
    return lambda total, gradient, hidden: kernels.wgrad_gemm_accum_fp32(hidden, gradient, total)


def _transformer_engine() -> AddProduct:
    general_gemm = import_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def add(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        general_gemm(hidden, gradient, out_dtype=torch.float32, layout="NT", out=total, accumulate=True, grad=True)

    return add


def _torch_mixed(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)


def _in_fp32(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    hidden = hidden.float()
    for begin in range(0, len(total), _CPU_ROWS):
        rows = slice(begin, begin + _CPU_ROWS)
        total[rows].addmm_(gradient[:, rows].t().float(), hidden)


def _is_right(function: AddProduct, device_type: str, dtype: torch.dtype) -> bool:
    """Whether it multiplies small whole numbers exactly, to sums that 16 bits do not hold, and adds them."""
    generator = torch.Generator().manual_seed(0)
    gradient, hidden = (torch.randint(-20, 21, (64, 128), generator=generator).float() for _ in range(2))
    total = torch.ones(128, 128, device=device_type)
    function(total, gradient.to(device_type, dtype), hidden.to(device_type, dtype))
    return torch.equal(total.cpu(), 1 + gradient.t() @ hidden)

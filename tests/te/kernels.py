"""torch in the place of Transformer Engine's CUDA kernels, so that its modules compute on a CPU. Test code only.

Transformer Engine loads it itself, right after its extension, where NVTE_PLUGIN names this module
(transformer_engine/common/__init__.py). Everything above the kernels stays its own: modules, autograd functions,
gradient accumulation, layouts, the unfused attention, the optimizer. Formulas are those of its C headers
(transformer_engine/common/include/transformer_engine/*.h) and docstrings; test_kernels.py compares them. Only what runs
without FP8, in dtypes that torch computes on a CPU.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

REPLACED: dict[str, Any] = {}  # by name in transformer_engine_torch
CALLED: set[str] = set()
ATTENTION: dict[str, Any] = {}  # what the last choice of a kernel for attention was asked for


def kernel(function: Any) -> Any:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(function.__name__)
        return function(*args, **kwargs)

    REPLACED[function.__name__] = counted
    return counted


def load_plugins() -> None:
    """Called by Transformer Engine when its extension is loaded."""
    extension = sys.modules["transformer_engine_torch"]
    for name, function in REPLACED.items():
        assert hasattr(extension, name), f"this Transformer Engine has no {name}"
        setattr(extension, name, function)


# ------------------------------------------------------------------------------------------------------- linear layers


def _multiply(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    """gemm.h: D = op(A) op(B) in columns, so op(B) op(A) in rows."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return (b.t() if transb else b) @ (a.t() if transa else a)


@kernel
def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad, workspace, workspace_size,
    accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=None,
):  # fmt: skip
    assert quantizer is None and comm_overlap is None and not gelu, "not replaced"
    product = alpha * _multiply(a, transa, b, transb)
    bias_gradient = None
    if bias is not None:
        if grad:
            bias_gradient = b.reshape(-1, b.shape[-1]).sum(0)
        else:
            product = product + bias
    if not transb:
        product = product.view(*b.shape[:-1], -1)
    if out is None:
        out = product
    elif accumulate:
        out.mul_(1.0 if beta is None else beta).add_(product.view(out.shape))
    else:
        out.copy_(product.view(out.shape))
    return out, bias_gradient, None, extra_output


@kernel
def te_general_grouped_gemm(
    a, transa, b, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, gelu_in, grad, workspaces,
    workspace_size, accumulate, use_split_accumulator, sm_count,
):  # fmt: skip
    """The same for each of a list; with `single_output` the results follow each other in the rows of one tensor."""
    outputs = out[0].split(list(m_splits)) if single_output else out
    for one_a, one_b, one_out, one_bias in zip(a, b, outputs, bias, strict=True):
        product = _multiply(one_a, transa, one_b, transb)
        if one_bias.numel() and grad:
            one_bias.copy_(one_b.sum(0))
        elif one_bias.numel():
            product = product + one_bias
        if accumulate:
            one_out.add_(product)
        else:
            one_out.copy_(product)
    return bias


# --------------------------------------------------------------------------------------------------------------- norms


@kernel
def rmsnorm_fwd(x, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """normalization.h: y = x / sqrt(mean(x^2) + eps) * gamma, or * (1 + gamma)."""
    assert quantizer is None, "not replaced"
    inverse = (x.float().square().mean(-1) + eps).rsqrt()
    y = (x.float() * inverse[:, None] * (weight + 1 if zero_centered_gamma else weight)).to(x.dtype)
    return [y if ln_out is None else ln_out.copy_(y), None, inverse]


@kernel
def rmsnorm_bwd(dy, x, inverse, weight, sm_margin, zero_centered_gamma):
    normed = x.float() * inverse[:, None]
    scaled = dy.float() * (weight + 1 if zero_centered_gamma else weight)
    dx = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)]


@kernel
def layernorm_fwd(x, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """normalization.h: y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta."""
    assert quantizer is None, "not replaced"
    mean = x.float().mean(-1)
    inverse = (x.float().var(-1, unbiased=False) + eps).rsqrt()
    y = (x.float() - mean[:, None]) * inverse[:, None] * (weight + 1 if zero_centered_gamma else weight)
    y = (y + bias).to(x.dtype)
    return [y if ln_out is None else ln_out.copy_(y), mean, inverse]


@kernel
def layernorm_bwd(dy, x, mean, inverse, weight, sm_margin, zero_centered_gamma):
    normed = (x.float() - mean[:, None]) * inverse[:, None]
    scaled = dy.float() * (weight + 1 if zero_centered_gamma else weight)
    centered = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
    dx = (inverse[:, None] * centered).to(x.dtype)
    return [dx, (dy.float() * normed).sum(0).to(weight.dtype), dy.float().sum(0).to(weight.dtype)]


# ------------------------------------------------------------------------------------------------- rotary positions


def _angles(x, freqs, thd, cu_seqlens, cp_size, cp_rank):
    """fp32 [s, 1, 1, d] or [t, 1, d]: of a document's every position on this context-parallel rank."""
    if not thd:
        return freqs[: x.shape[0]]
    parts = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        half = (end - begin) // (2 * cp_size) if cp_size > 1 else end - begin
        parts.append(freqs[cp_rank * half : (cp_rank + 1) * half])
        if cp_size > 1:
            parts.append(freqs[(2 * cp_size - cp_rank - 1) * half : (2 * cp_size - cp_rank) * half])
    return torch.cat(parts)[:, 0]


def _turn(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, sign):
    from transformer_engine.pytorch.attention.rope import QKVFormat

    assert start_positions is None and not interleaved and qkv_format != QKVFormat["bshd"], "not replaced"
    angles = _angles(x, freqs, qkv_format == QKVFormat["thd"], cu_seqlens, cp_size, cp_rank)
    turned, rest = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
    first, second = turned.float().chunk(2, -1)
    half = torch.cat((-second, first), -1)
    return torch.cat(((turned * angles.cos() + sign * half * angles.sin()).to(x.dtype), rest), -1)


@kernel
def fused_rope_forward(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    """rope.py, `_apply_rotary_pos_emb_base` and `_get_freqs_on_this_cp_rank`: t cos + rotate_half(t) sin."""
    return _turn(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, 1)


@kernel
def fused_rope_backward(dy, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    """The inverse rotation."""
    return _turn(dy, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, -1)


# ---------------------------------------------------------------------------------------------------------- sequences


@kernel
def thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank):
    """fused_attn.h: each document in 2 * world_size parts, of which a rank has its own from the front and the back."""
    indices = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = (end - begin) // (2 * world_size)
        for number in (rank, 2 * world_size - rank - 1):
            indices += range(begin + number * part, begin + (number + 1) * part)
    return torch.tensor(indices, dtype=torch.int32)


def _places(cu_seqlens: Tensor, length: int) -> Tensor:
    """bool [documents, length]: where a padded batch of the documents has tokens."""
    return torch.arange(length) < cu_seqlens.diff()[:, None]


@kernel
def convert_thd_to_bshd(tensor, cu_seqlens, b, max_seq_len):
    """[t, h, d] -> [b, max_seq_len, h, d]: one document per row."""
    padded = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    padded[_places(cu_seqlens, max_seq_len)] = tensor[: int(cu_seqlens[-1])]
    return padded


@kernel
def convert_bshd_to_thd(tensor, cu_seqlens, t):
    """The inverse."""
    packed = tensor.new_zeros(t, *tensor.shape[2:])
    packed[: int(cu_seqlens[-1])] = tensor[_places(cu_seqlens, tensor.shape[1])]
    return packed


# ---------------------------------------------------------------------------------------------------------- optimizer


@kernel
def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay):
    """multi_tensor.h and fused_adam.py: torch.optim.AdamW where mode is 1, torch.optim.Adam where it is 0."""
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        if mode == 0:
            gradient = gradient + weight_decay * parameter
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * parameter
        parameter.sub_(lr * update)


@kernel
def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    """multi_tensor.h: the norm of all inputs, and of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else norms.new_empty(0)


@kernel
def multi_tensor_scale(chunk, noop, lists, scale):
    """multi_tensor.h: output = input * scale; the flag is raised where one is not finite."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        if not bool(target.isfinite().all()):
            noop.fill_(1)


@kernel
def multi_tensor_scale_tensor(chunk, noop, lists, scale):
    """The same by a tensor [1]."""
    REPLACED["multi_tensor_scale"](chunk, noop, lists, float(scale))

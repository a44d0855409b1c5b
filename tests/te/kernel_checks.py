"""Transformer Engine's modules on the replaced kernels, against the formulas of their docstrings in float64.

Prints as its last line, for each, the largest difference of outputs and gradients, relative to their largest element.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention
from transformer_engine.pytorch import optimizers
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

from megatron_idft.integration.platform import cpu
from tests.te import kernels

BOUNDS = [0, 4, 12, 28]  # documents of THD, each a multiple of four
ANGLES = torch.arange(32.0)[:, None, None, None] * torch.linspace(0.1, 1, 3).repeat(2)


def largest(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(got, wanted, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)) for a, b in pairs)


def difference(module: torch.nn.Module, formula: Callable[..., Tensor], x: Tensor, *args: Any) -> float:
    """Of values and gradients; `formula` takes float64 x and the parameters by name."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x.requires_grad_()
    out = module(x, *args)
    weight = torch.randn_like(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    got = torch.autograd.grad((out * weight).sum(), [x, *parameters])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]
    wanted = formula(exact[0], dict(zip(names, exact[1:], strict=True)))
    return largest([out, *got], [wanted, *torch.autograd.grad((wanted * weight.double()).sum(), exact)])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / RMS_eps(x) * gamma, RMS_eps(x) = sqrt(1/n sum x_i^2 + eps)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear_layers() -> dict[str, float]:
    def grouped(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        parts = x.split([3, 0, 5])
        return torch.cat([linear(part, p[f"weight{i}"], p[f"bias{i}"]) for i, part in enumerate(parts)])

    found = {
        "Linear": difference(te.Linear(6, 10), lambda x, p: linear(x, p["weight"], p["bias"]), torch.randn(4, 2, 6)),
        "GroupedLinear": difference(te.GroupedLinear(3, 6, 10), grouped, torch.randn(8, 6), [3, 0, 5]),
    }
    for centered in (False, True):

        def fused(x: Tensor, p: dict[str, Tensor], offset: int = int(centered)) -> Tensor:
            normed = rms_norm(x, p["layer_norm_weight"] + offset, 1e-3)
            return linear(normed, p["weight"], p["bias"])

        def layer_normed(x: Tensor, p: dict[str, Tensor], offset: int = int(centered)) -> Tensor:
            normed = layer_norm(x, (6,), p["layer_norm_weight"] + offset, p["layer_norm_bias"], 1e-3)
            return linear(normed, p["weight"], p["bias"])

        for kind, formula in (("RMSNorm", fused), ("LayerNorm", layer_normed)):
            settings: dict[str, Any] = {"normalization": kind, "zero_centered_gamma": centered}
            module = te.LayerNormLinear(6, 10, eps=1e-3, **settings)
            found[f"LayerNormLinear {settings}"] = difference(module, formula, torch.randn(4, 2, 6))
    return found


def norms() -> dict[str, float]:
    found = {}
    for centered in (False, True):
        found[f"RMSNorm {centered}"] = difference(
            te.RMSNorm(6, eps=1e-3, zero_centered_gamma=centered),
            lambda x, p, o=int(centered): rms_norm(x, p["weight"] + o, 1e-3),
            torch.randn(4, 2, 6),
        )
        found[f"LayerNorm {centered}"] = difference(
            te.LayerNorm(6, eps=1e-3, zero_centered_gamma=centered),
            lambda x, p, o=int(centered): layer_norm(x, (6,), p["weight"] + o, p["bias"], 1e-3),
            torch.randn(4, 2, 6),
        )
    return found


def accumulation() -> float:
    """fuse_wgrad_accumulation: gradients are added to `main_grad`, not to `grad`."""
    module = te.Linear(6, 10, bias=False, fuse_wgrad_accumulation=True)
    module.weight.main_grad = torch.ones(10, 6)
    x = torch.randn(5, 6, requires_grad=True)
    for _ in range(2):
        module(x).sum().backward()
    return largest([module.weight.main_grad], [1 + 2 * x.detach().sum(0).expand(10, 6)])


def rotary() -> dict[str, float]:
    """Against Transformer Engine's own unfused function."""
    found = {}
    cases = [("sbhd", 1, 0), ("thd", 1, 0), ("thd", 2, 0), ("thd", 2, 1)]
    for layout, size, rank in cases:
        shape = (BOUNDS[-1] // size, 2, 8) if layout == "thd" else (20, 3, 2, 8)  # two of eight are not turned
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(shape)
        bounds = torch.tensor(BOUNDS, dtype=torch.int32) if layout == "thd" else None
        settings = {"tensor_format": layout, "cu_seqlens": bounds, "cp_size": size, "cp_rank": rank}
        pair = []
        for fused in (True, False):
            out = apply_rotary_pos_emb(x, ANGLES, fused=fused, **settings)
            pair.append([out, torch.autograd.grad((out * weight).sum(), x)[0]])
        found[f"rotary {layout} {rank} of {size}"] = largest(*pair)
    return found


def documents() -> float:
    """THD attention, whose layouts are converted by kernels, against each document by itself."""
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2, attn_mask_type="padding_causal", attention_dropout=0.0)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    q, k, v = (torch.randn(BOUNDS[-1], heads, 8, requires_grad=True) for heads in (4, 2, 2))
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": 16, "max_seqlen_kv": 16}
    out = attention(q, k, v, qkv_format="thd", **lengths)
    parts = []
    for begin, end in itertools.pairwise(BOUNDS):
        one = (x[begin:end].double().transpose(0, 1) for x in (q, k, v))
        parts.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1))
    wanted = torch.cat(parts)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    return largest([out, *gradients], [wanted, *torch.autograd.grad((wanted * weight.double()).sum(), (q, k, v))])


def partition() -> float:
    """Of documents over context-parallel ranks: each position once, and the rotary angles are those of its place."""
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    places = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(BOUNDS)])
    x = torch.randn(BOUNDS[-1], 1, 6)
    whole = apply_rotary_pos_emb(x, ANGLES, "thd", cu_seqlens=bounds)
    seen, worst = [], 0.0
    for rank in range(2):
        own = kernels.thd_get_partitioned_indices(bounds, BOUNDS[-1], 2, rank).long()
        part = apply_rotary_pos_emb(x[own], ANGLES, "thd", cu_seqlens=bounds, cp_size=2, cp_rank=rank)
        worst = max(worst, largest([part], [whole[own]]))
        seen += own.tolist()
        lengths = torch.tensor(BOUNDS).diff() // 4
        halves = [
            torch.cat([d[rank * n : (rank + 1) * n], d[(3 - rank) * n : (4 - rank) * n]])
            for d, n in zip(places.split(torch.tensor(BOUNDS).diff().tolist()), lengths.tolist(), strict=True)
        ]
        assert places[own].tolist() == torch.cat(halves).tolist()
    assert sorted(seen) == list(range(BOUNDS[-1]))
    return worst


def optimizer() -> dict[str, float]:
    """fused_adam.py: a drop-in replacement for torch's AdamW, or Adam with adam_w_mode=False."""
    found = {}
    for decoupled, reference in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        ours, theirs = (torch.nn.Parameter(torch.arange(1.0, 7.0)) for _ in range(2))
        settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
        pair = [optimizers.FusedAdam([ours], adam_w_mode=decoupled, **settings), reference([theirs], **settings)]
        for _ in range(4):
            ours.grad = torch.randn(6)
            theirs.grad = ours.grad.clone()
            for each in pair:
                each.step()
        found[f"FusedAdam {decoupled}"] = largest([ours.detach()], [theirs.detach()])
    tensors = [torch.randn(3, 4), torch.randn(5)]
    flag = torch.zeros(1, dtype=torch.int32)
    applier = optimizers.multi_tensor_applier
    norm, each = applier(optimizers.multi_tensor_l2norm, flag, [tensors], True)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    found["l2norm"] = largest([norm, each], [flat.norm()[None], torch.stack([tensor.norm() for tensor in tensors])])
    for kernel, half in (
        (optimizers.multi_tensor_scale, 0.5),
        (optimizers.multi_tensor_scale_tensor, torch.full((1,), 0.5)),
    ):
        scaled = [torch.empty_like(tensor) for tensor in tensors]
        flag.zero_()
        applier(kernel, flag, [tensors, scaled], half)
        found[kernel.__name__] = largest(scaled, [tensor / 2 for tensor in tensors])
        assert not flag.any()
        applier(kernel, flag, [[torch.tensor([torch.inf])], [torch.empty(1)]], half)
        assert flag.all(), "not finite"
    return found


def main() -> None:
    cpu.enable()  # it is, in machine.py
    torch.manual_seed(5)
    found = linear_layers() | norms() | rotary() | optimizer()
    found |= {"accumulation": accumulation(), "documents": documents(), "partition": partition()}
    print(json.dumps({"differences": found, "untried": sorted(kernels.REPLACED.keys() - kernels.CALLED)}))


if __name__ == "__main__":
    main()

"""Context parallelism for Transformer Engine's unfused attention, which has none. Test code only.

Its kernels pass keys and values around the ranks; here every rank gathers them, attends to whole documents, and keeps
its own part. So no kernel is shown right, but that all ranks were given the same documents, angles and parts.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

ASKED = ("qkv_layout", "batch_size", "max_seqlen_q", "attn_mask_type", "pad_between_seqs", "context_parallel")


class _Gathered(torch.autograd.Function):
    """[t / c, …] of each rank -> [t, …] in the order of the sequence; the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, places: list[Tensor]) -> Tensor:
        parts = [torch.empty_like(part) for _ in places]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        whole = part.new_empty(len(part) * len(places), *part.shape[1:])
        for place, one in zip(places, parts, strict=True):
            whole[place] = one
        ctx.group, ctx.own = group, places[group.rank()]
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[ctx.own], None, None


def install() -> None:
    from megatron.core import mpu

    from tests.te import kernels

    name = "transformer_engine.pytorch.attention.dot_product_attention"
    utils, backends = (importlib.import_module(f"{name}.{part}") for part in ("utils", "backends"))
    choose, attend = utils.get_attention_backend, backends.UnfusedDotProductAttention.forward

    def choose_unfused(params: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.ATTENTION.update({name: getattr(params, name) for name in ASKED})
        return choose(dataclasses.replace(params, context_parallel=False), *args, **kwargs)

    def attend_to_all(self: Any, cache: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        group = mpu.get_context_parallel_group(check_initialized=False)
        if group is None or group.size() == 1:
            return attend(self, cache, query, key, value, **kwargs)
        bounds = kwargs["cu_seqlens_q"]
        assert "thd" in kwargs["qkv_layout"], "not replaced"
        places = [
            kernels.thd_get_partitioned_indices(bounds, int(bounds[-1]), group.size(), rank).long()
            for rank in range(group.size())
        ]
        whole = [_Gathered.apply(part, group, places) for part in (query, key, value)]
        return attend(self, cache, *whole, **kwargs)[places[group.rank()]]

    utils.get_attention_backend = choose_unfused
    backends.UnfusedDotProductAttention.forward = attend_to_all

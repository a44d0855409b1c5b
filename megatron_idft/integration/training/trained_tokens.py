"""How many tokens of a micro-batch are trained, known on the host before the device has seen them.

The fused output head computes the trained tokens only. Its shapes are made on the host, which would have to wait for
the device if it were asked for the number.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megatron_idft.integration.platform.ranks import print_on_rank_0


class TrainedTokenCounter:
    """Counts the trained tokens of this rank's part of each micro-batch.

    Args:
        rank, size: this rank's place among those that share a sequence by context parallelism, and their number.
        group: gloo, of the tensor-parallel ranks, the first of which has the samples; None where that rank is alone.
    """

    def __init__(self, rank: int, size: int, group: torch.distributed.ProcessGroup | None) -> None:
        self.rank, self.size, self.group = rank, size, group

    def __call__(self, sample: Mapping[str, Tensor] | None) -> int:
        """The number, in which untrained tokens have no part whatever their labels.

        Args:
            sample: of the data loader, with `loss_mask` [b, s] and with packs their `bounds` [b, n], on the CPU; None
                on all but the first of the tensor-parallel ranks.

        Returns:
            that of the first rank. Collectives: one broadcast of eight bytes between the hosts of `group`.
        """
        count = torch.zeros(1, dtype=torch.int64)
        if sample is not None:
            count[0] = trained_tokens(sample["loss_mask"], sample.get("bounds"), self.rank, self.size)
        if self.group is not None:
            torch.distributed.broadcast(count, group=self.group, group_src=0)
        return int(count)


def trained_tokens(loss_mask: Tensor, bounds: Tensor | None, rank: int = 0, size: int = 1) -> int:
    """The trained tokens of one context-parallel rank's part of a micro-batch.

    Each document, or the sequence that is none of a pack, is cut in 2 c parts, of which a rank has its own from the
    front and from the back: core/utils.py, and fused_attn.h of Transformer Engine.

    Args:
        loss_mask: [b, s] fp32, not 0 where trained.
        bounds: [b, n] int32, ascending from 0 to s; None: each row is one document.
        rank, size: of the c ranks.
    """
    trained = loss_mask != 0
    if size == 1:
        return int(trained.sum())
    if bounds is None:
        bounds = torch.tensor([0, loss_mask.shape[1]]).expand(len(loss_mask), 2)
    before = torch.nn.functional.pad(trained.cumsum(1), (1, 0))  # [b, s + 1]
    begins, lengths = bounds[:, :-1].long(), bounds.long().diff() // (2 * size)
    count = 0
    for number in (rank, 2 * size - rank - 1):
        begin = begins + number * lengths
        count += int((before.gather(1, begin + lengths) - before.gather(1, begin)).sum())
    return count


def trained_token_counter(args: argparse.Namespace) -> TrainedTokenCounter | None:
    """The counter of a run; None where nobody asks for the number, or, which is said, where it cannot be had.

    Called on every rank. Collectives: with tensor parallelism it makes a group of gloo.

    Args:
        args: Megatron's, validated.
    """
    from megatron.core import mpu

    if getattr(args, "sft_loss_head", None) != "fused":
        return None
    alone = mpu.get_tensor_model_parallel_world_size() == 1
    obstacle = None
    if args.cuda_graph_impl == "full_iteration":
        obstacle = "a CUDA graph of whole iterations repeats the numbers of tokens that it was captured with"
    elif not alone and not args.use_gloo_process_groups:
        obstacle = "tensor-parallel ranks tell each other the number by gloo: drop --disable-gloo-process-groups"
    if obstacle is not None:
        print_on_rank_0(f"> --sft-loss-head fused computes untrained tokens too: {obstacle}")
        return None
    group: Any = None  # new_group may also return a number, on ranks that are not named
    if not alone:
        group = torch.distributed.new_group(
            torch.distributed.get_process_group_ranks(mpu.get_tensor_model_parallel_group()),
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
            backend="gloo",
            use_local_synchronization=True,  # one call makes the group of each rank
            group_desc="MEGATRON_IDFT_TRAINED_TOKENS",
        )
    return TrainedTokenCounter(mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size(), group)

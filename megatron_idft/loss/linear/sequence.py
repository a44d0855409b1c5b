"""Exchange of hidden states [T, H] and their gradients over the tensor-parallel ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss.linear.tokens import spread


def gather_sequence(hidden: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[T/tp, H] of each rank -> [T, H]. Collectives: one all-gather; none without other ranks."""
    if tp_group is None or tp_group.size() == 1 or not hidden.numel():
        return hidden
    whole = hidden.new_empty(tp_group.size() * hidden.shape[0], hidden.shape[1])
    torch.distributed.all_gather_into_tensor(whole, hidden.contiguous(), group=tp_group)
    return whole


def sum_gradient(
    gradient: Tensor, rows: Tensor | None, tokens: int, sequence_parallel: bool, tp_group: ProcessGroup | None
) -> Tensor:
    """The sum over ranks of gradient [n, H], in the layout of the hidden states: [T, H], or this rank's [T/tp, H].

    Collectives: one all-reduce [n, H], or under sequence parallelism one reduce-scatter [T, H]; none without other
    ranks.
    """
    if tp_group is None or tp_group.size() == 1 or not gradient.numel():
        return spread(gradient, rows, tokens)
    if not sequence_parallel:
        torch.distributed.all_reduce(gradient, group=tp_group)
        return spread(gradient, rows, tokens)
    whole = spread(gradient, rows, tokens)
    part = whole.new_empty(tokens // tp_group.size(), whole.shape[1])
    torch.distributed.reduce_scatter_tensor(part, whole, group=tp_group)
    return part

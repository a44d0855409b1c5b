"""This rank's part of a vocabulary that is split evenly over a tensor-parallel group."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class VocabShard(NamedTuple):
    """Attributes:
    start: global token id of the shard's first column.
    valid_columns: leading columns that belong to the true vocabulary; the rest is padding. May be 0.
    padded_columns: all columns of the shard, as many on every rank.
    tp_group: the group that holds the other shards; None without tensor parallelism.
    """

    start: int
    valid_columns: int
    padded_columns: int
    tp_group: ProcessGroup | None

    def gather_states(self, state: Tensor) -> Tensor:
        """[..., S] fp32 state of this shard -> [R, ..., S] of all shards in rank order, the same bits on every rank.

        Collectives: one all-gather over `tp_group`; none without tensor parallelism or without tokens.
        """
        if self.tp_group is None or self.tp_group.size() == 1 or state.numel() == 0:
            return state.unsqueeze(0)
        if torch.compiler.is_compiling():
            # It imports the compiler.
            from torch.distributed._functional_collectives import all_gather_tensor  # noqa: PLC0415

            gathered = all_gather_tensor(state, gather_dim=0, group=self.tp_group)
            return gathered.view(self.tp_group.size(), *state.shape)
        states, work = self.begin_gather(state)
        if work is not None:
            work.wait()
        return states

    def begin_gather(self, state: Tensor) -> tuple[Tensor, Work | None]:
        """The same, not waited for: the states may be read after `wait()` of the work; None: they are there."""
        if self.tp_group is None or self.tp_group.size() == 1 or state.numel() == 0:
            return state.unsqueeze(0), None
        states = state.new_empty(self.tp_group.size(), *state.shape)
        # Concatenated along the first dimension: the one form that gloo and NCCL both take.
        into = states.flatten(0, 1)
        return states, torch.distributed.all_gather_into_tensor(into, state, group=self.tp_group, async_op=True)

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold other shards."""
        return self.tp_group is not None and self.tp_group.size() > 1


def vocab_shard(num_columns: int, vocab_size: int | None, tp_group: ProcessGroup | None) -> tuple[VocabShard, int]:
    """The shard of this rank and the true vocabulary size, for local logits with `num_columns` columns.

    Raises:
        ValueError: `vocab_size` is not in (0, num_columns * tp], or this process is not in `tp_group`.
    """
    if tp_group is not None and not isinstance(tp_group, ProcessGroup):  # GroupMember.NON_GROUP_MEMBER
        raise ValueError("this process is not a member of tp_group; pass the group that holds its vocabulary shard")
    tp_size, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    padded_size = num_columns * tp_size
    if vocab_size is None:
        vocab_size = padded_size
    if not 0 < vocab_size <= padded_size:
        raise ValueError(
            f"vocab_size must lie in (0, {padded_size}], the {num_columns} columns of the logits times the "
            f"tensor-parallel size {tp_size}; got {vocab_size}"
        )
    start = rank * num_columns
    return VocabShard(start, min(max(vocab_size - start, 0), num_columns), num_columns, tp_group), vocab_size

"""The most probable tokens of each place, from a vocabulary that stays split over its ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss import distribution_statistics

_BLOCK_BYTES = 1 << 26  # of the keys of some rows at a time
_LOW = 0xFFFFFFFF  # the half of a key that counts ids downwards


def top_tokens(
    logits: Tensor, top_k: int, *, tp_group: ProcessGroup | None, vocab_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The K most probable tokens of each row, the most probable first, and of equal ones the lowest id.

    The same on every rank, and for every way of splitting the same logits.

    Args:
        logits: [..., V/tp] this rank's shard of the padded vocabulary; bf16, fp16 or fp32.
        top_k: K, at most vocab_size.
        tp_group: None: no tensor parallelism.
        vocab_size: of the true vocabulary.
        backend: as in `vocab_parallel_loss`.

    Returns:
        ids int64 and log-probabilities fp32 [..., K]. Collectives: that of `distribution_statistics`, and one
        all-gather of K int64 numbers for each row. Memory beyond the logits: int64 of some rows of them.
    """
    state, shard = distribution_statistics(logits, tp_group=tp_group, vocab_size=vocab_size, backend=backend)
    rows = logits[..., : shard.valid_columns].flatten(0, -2)
    # A shard may have fewer tokens than K, or none; what fills it up is below all keys.
    keys = torch.full((len(rows), top_k), torch.iinfo(torch.int64).min, device=logits.device)
    ids = _LOW - torch.arange(shard.start, shard.start + shard.valid_columns, device=logits.device)
    here = min(top_k, shard.valid_columns)
    if here:
        step = max(1, _BLOCK_BYTES // (8 * shard.valid_columns))
        for first in range(0, len(rows), step):
            block = _ordered(rows[first : first + step]) << 32 | ids
            keys[first : first + step, :here] = block.topk(here, -1).values
    gathered = shard.gather_states(keys)  # [R, rows, K]
    keys = gathered.movedim(0, 1).flatten(1).topk(top_k, -1).values.view(*logits.shape[:-1], top_k)
    values = _ordered_back(keys >> 32)
    log_prob = (values - state.max[..., None]) - state.sum_exp[..., None].log()
    return _LOW - (keys & _LOW), log_prob


def _ordered(values: Tensor) -> Tensor:
    """Integers, as int64, that are ordered as the fp32 values of these numbers are."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: of the two zeros one
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _ordered_back(bits: Tensor) -> Tensor:
    bits = bits.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)

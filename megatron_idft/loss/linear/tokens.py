"""Which tokens the output head computes, and how many at a time."""

import torch
from torch import Tensor

_CHUNKS = 8
_BLOCK_BYTES = 2**28


def default_chunk_tokens(tokens: int, device: torch.device | str = "cuda") -> int:
    """Tokens whose gradient is multiplied with hidden states and weight at once.

    A chunk of c tokens costs c V/tp numbers of memory, and 8 bytes of traffic per element of the weight's fp32
    gradient, which its product adds to: against the 6 c operations of the three products that is 219 / c of their time
    on an H200 (4.8 TB/s, 790 Tflop/s), a fifth at 1024 tokens and a twentieth at 4096. So: an eighth of the tokens,
    for an eighth of the logits' memory, but from 1024 to 4096. On a CPU, whose arithmetic is slower by far than its
    memory, a sixteenth, and from 128.

    Args:
        tokens: all that are computed, so the trained ones under compaction.
        device: where.
    """
    on_cpu = torch.device(device).type == "cpu"
    parts, least, most = (2 * _CHUNKS, 128, 1024) if on_cpu else (_CHUNKS, 1024, 4096)
    return even_chunk(tokens, min(max(-(-tokens // parts), least), most))


def even_chunk(tokens: int, most: int) -> int:
    """The chunk, a multiple of 128 unless `most` is smaller, that cuts tokens into as few parts, and evenly."""
    if tokens <= most:
        return max(tokens, 1)
    each = -(-tokens // -(-tokens // most))
    return min(-(-each // 128) * 128, most)


def block_tokens(chunk_tokens: int, columns: int) -> int:
    """Tokens whose fp32 logits [block, V/tp] are kept at a time: a quarter of a chunk, and at most 256 MiB or 256."""
    most = max(_BLOCK_BYTES // (4 * columns) // 128 * 128, 256)
    return min(chunk_tokens, most, -(-chunk_tokens // 256) * 64)


def spans(tokens: int, size: int) -> list[slice]:
    """[0, tokens) in parts of `size`, the last maybe shorter; one empty part for no tokens."""
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, max(tokens, 1), size)]


def trained_rows(labels: Tensor, vocab_size: int, num_trained: int | None) -> Tensor | None:
    """[n] int64: the trained positions of labels [T] in order, then others; None: all positions, as they lie.

    n is num_trained, but at least 1.

    The count comes from the host, so that shapes are known without waiting for the device.
    """
    if num_trained is None or num_trained >= labels.numel():
        return None
    ignored = (labels < 0) | (labels >= vocab_size)
    return torch.argsort(ignored.to(torch.uint8), stable=True)[: max(num_trained, 1)]


def spread(values: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """[n, ...] of the rows -> [T, ...] with zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(tokens, *values.shape[1:]).index_copy_(0, rows, values)

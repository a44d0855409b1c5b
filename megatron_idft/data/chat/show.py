"""Shows a training sample, for a person to read before the GPU hours are spent."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from megatron_idft.data.chat.tokenizer import ChatTokenizer

OPEN, CLOSE = "⟦", "⟧"


def render_sample(
    token_ids: Sequence[int] | ArrayLike, loss_mask: ArrayLike, tokenizer: ChatTokenizer, *, max_run: int | None = 2000
) -> str:
    """The decoded sample with the trained spans in ⟦…⟧, or ⟦…⟧×0.5 where they weigh 0.5, under one line of counts.

    Args:
        token_ids: [n].
        loss_mask: [n], which tokens are trained, or their weights.
        tokenizer: of the sample.
        max_run: runs of more characters lose their middle.
    """
    ids, weights = np.asarray(token_ids), np.asarray(loss_mask)
    if ids.ndim != 1 or ids.shape != weights.shape:
        shapes = f"{ids.shape} and {weights.shape}"
        raise ValueError(f"token_ids and loss_mask must be one-dimensional and alike, got {shapes}")
    cuts = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(ids)]
    text, at = "", 0
    # A run decoded alone would lose its leading blank with some tokenizers, so decode ever longer beginnings of the
    # sample.
    decoded = [tokenizer.decode(ids[:cut]) for cut in cuts]
    whole = decoded[-1]
    for (start, _), end in zip(pairwise(cuts), decoded[1:], strict=True):
        upto = len(end) if whole.startswith(end) else len(_common(end, whole))
        run = _elide(whole[at:upto], max_run)
        weight = float(weights[start]) if len(ids) else 0.0
        text += f"{OPEN}{run}{CLOSE}{'' if weight == 1 else f'×{weight:g}'}" if weight else run
        at = upto
    trained = np.count_nonzero(weights)
    return f"{len(ids):,} tokens, {trained:,} trained (between {OPEN} and {CLOSE}):\n{text}"


def _common(a: str, b: str) -> str:
    """The common beginning: a cut inside a character decodes to a replacement character, which the whole lacks."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _elide(run: str, limit: int | None) -> str:
    if limit is None or len(run) <= limit:
        return run
    return f"{run[: limit // 2]} …({len(run) - 2 * (limit // 2):,} characters)… {run[len(run) - limit // 2 :]}"

"""Random draws that depend on (seed, record, step) alone: not on the batch, the number of ranks or a restart."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def uniform(seed: int, record_ids: Sequence[str], step: int) -> NDArray[np.float64]:
    """One draw from [0, 1) with 53 random bits for each record: BLAKE2b over (seed, step, id)."""
    words = [
        hashlib.blake2b(f"{seed}:{step}:{record_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for record_id in record_ids
    ]
    return np.array([int.from_bytes(word, "little") >> 11 for word in words], dtype=np.float64) * 2.0**-53


def sample(logits: NDArray[np.floating], temperature: float, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token ids [b] by inversion of the cumulative distribution, in float64.

    logits: [b, V] over the true vocabulary. temperature: > 0 divides the logits; 0 takes the first largest. draws: [b].
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    cumulative = weights.cumsum(-1)
    chosen = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    return np.minimum(chosen, logits.shape[-1] - 1)

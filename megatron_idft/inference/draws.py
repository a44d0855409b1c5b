"""Random draws that depend only on (seed, record, step), not on the batch, the number of ranks or a restart."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def draw(seed: int, record_id: str, step: int) -> float:
    """A number from [0, 1) with 53 random bits: BLAKE2b over (seed, step, id)."""
    key = f"{seed}:{step}:{record_id}".encode("utf-8", "surrogatepass")
    word = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(word, "little") >> 11) * 2.0**-53


def uniform(seed: int, record_ids: Sequence[str], step: int) -> NDArray[np.float64]:
    """One draw for each record."""
    return np.array([draw(seed, record_id, step) for record_id in record_ids], dtype=np.float64)


def sample(logits: NDArray[np.floating], temperature: float, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token ids [b] by inversion of the cumulative distribution, in float64.

    Args:
        logits: [b, V] over the true vocabulary.
        temperature: > 0 divides the logits; 0 takes the first largest.
        draws: [b], uniform in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    cumulative = weights.cumsum(-1)
    chosen = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    ids: NDArray[np.int64] = np.minimum(chosen, logits.shape[-1] - 1)
    return ids

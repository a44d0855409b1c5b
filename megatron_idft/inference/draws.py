"""Random draws that depend only on (seed, record, step), not on the batch, the number of ranks or a restart."""

import hashlib


def draw(seed: int, record_id: str, step: int) -> float:
    """A number from [0, 1) with 53 random bits: BLAKE2b over (seed, step, id)."""
    key = f"{seed}:{step}:{record_id}".encode("utf-8", "surrogatepass")
    word = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(word, "little") >> 11) * 2.0**-53

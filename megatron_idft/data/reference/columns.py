"""The columns of a reference model beside the tokens of packs: on disk, in samples and in batches."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

# Of each column: the file of a pack, and its name in samples and batches. The names are those of statistics.Reference.
FILES = {
    "log_prob": ".reference.bin",
    "entropy": ".reference_entropy.bin",
    "top_ids": ".reference_top_ids.bin",
    "top_log_prob": ".reference_top.bin",
}
KEYS = {name: f"reference_{name}" for name in FILES}
LOWEST_FLOAT16 = -65504.0


@dataclass(frozen=True, slots=True)
class ReferenceColumns:
    """Which numbers of a reference model stand beside each token. The log q of the token itself always does.

    Args:
        entropy: that of the reference's distribution, too.
        top_k: so many of its most probable tokens, with their log q; 0: none.
        dtype: float32 or float16, of all that is no id.
    """

    entropy: bool = False
    top_k: int = 0
    dtype: str = "float32"

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """Those that `values` tell among other things, such as the JSON of packs."""
        return cls(values["entropy"], values["top_k"], values["dtype"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name of each column, and its shape for one token."""
        of_top: dict[str, tuple[int, ...]] = {"top_ids": (self.top_k,), "top_log_prob": (self.top_k,)}
        return {"log_prob": ()} | ({"entropy": ()} if self.entropy else {}) | (of_top if self.top_k else {})

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """That of a column on disk, little-endian."""
        return np.dtype("int32" if name == "top_ids" else self.dtype).newbyteorder("<")

    @property
    def token_bytes(self) -> dict[str, int]:
        """Of each column, on disk."""
        return {name: self.dtype_of(name).itemsize * math.prod(shape) for name, shape in self.shapes.items()}

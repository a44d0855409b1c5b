"""How far the hint is followed: the hint share of the next token, from the entropy of the hinted stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.mixing_modes import MIXING_MODES, MixingMode


@dataclass(frozen=True, slots=True)
class EntropyMixing:
    """The hint share in [0, 1] from Hn = H / ln(entropy_vocab_size), H the hinted stream's entropy at temperature 1.

    Where the hint makes the model certain, the hint is followed; where many continuations remain, the model's own style
    is. The modes, linear being the paper's (arXiv 2602.12222) and the next two those of the authors' code:

        linear     1 - clamp(slope Hn, 0, 1)
        sigmoid    1 - 1 / (1 + exp(-slope (Hn - center)))
        piecewise  1 up to Hn = low, 0 from Hn = high, linear between
        fixed      hint_share. With 1 only the hinted stream writes (answer-conditioned self-distillation); with 0, and
                   first_token_hinted off, only the plain one (plain sampling).

    Args:
        entropy_vocab_size: V of Hn; the authors take their model's padded number of rows.
        mode: one of the above.
        slope: of linear and sigmoid; the paper's beta.
        center: of sigmoid.
        low, high: of piecewise.
        hint_share: of fixed, and only there.
        first_token_hinted: the first token comes only from the hinted stream, as in the authors' code.

    Raises:
        InputError: a value lies outside its range.
    """

    entropy_vocab_size: int
    mode: MixingMode = "linear"
    slope: float = 3.0
    center: float = 0.5
    low: float = 0.3
    high: float = 0.7
    hint_share: float | None = None
    first_token_hinted: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MIXING_MODES:
            raise InputError(f"mixing {self.mode!r} is none of {', '.join(MIXING_MODES)}")
        if self.entropy_vocab_size < 2:
            raise InputError(f"entropy vocabulary of {self.entropy_vocab_size}: pass a whole number from 2")
        if not 0 <= self.slope < math.inf:
            raise InputError(f"mixing slope {self.slope}: pass a number from 0")
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"mixing from {self.low} to {self.high}: pass 0 <= low < high <= 1")
        if (self.mode == "fixed") != (self.hint_share is not None):
            raise InputError("the mixing fixed, and no other one, needs a hint share: pass --hint-share")
        if self.hint_share is not None and not 0 <= self.hint_share <= 1:
            raise InputError(f"hint share {self.hint_share}: pass a number from 0 to 1")

    def plain_share(self, hinted_entropy: Tensor) -> Tensor:
        """The share of the plain stream: lambda of `Mixing`.

        Args:
            hinted_entropy: fp32 [n], H in nats.

        Returns:
            fp32 [n]. The hint share is 1 less it: where it is small, fp32 keeps more digits of it.
        """
        normalized = hinted_entropy / math.log(self.entropy_vocab_size)
        if self.mode == "linear":
            return (self.slope * normalized).clamp(0, 1)
        if self.mode == "sigmoid":
            return torch.sigmoid(self.slope * (normalized - self.center))
        if self.mode == "piecewise":
            return ((normalized - self.low) / (self.high - self.low)).clamp(0, 1)
        return torch.full_like(normalized, 1 - (self.hint_share or 0.0))

    @property
    def has_slope(self) -> bool:
        return self.mode in ("linear", "sigmoid")

    def scaled(self, factor: float) -> EntropyMixing:
        """The same with `factor` times the slope; without change where the mode has no slope."""
        return replace(self, slope=self.slope * factor) if self.has_slope else self

    def describe(self) -> dict[str, Any]:
        """The numbers that the mode uses, for manifests and reports."""
        used = {
            "sigmoid": ("slope", "center"),
            "linear": ("slope",),
            "piecewise": ("low", "high"),
            "fixed": ("hint_share",),
        }
        return {
            "mode": self.mode,
            **{name: getattr(self, name) for name in used[self.mode]},
            "first_token": "hinted" if self.first_token_hinted else "mixed",
            "entropy_vocab_size": self.entropy_vocab_size,
        }

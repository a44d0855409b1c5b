"""How far the hinted stream is followed: lambda, the share of the plain stream, from the hinted stream's entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_idft.errors import InputError

MixingMode = Literal["linear", "sigmoid", "piecewise", "fixed"]
MIXING_MODES: tuple[MixingMode, ...] = get_args(MixingMode)


@dataclass(frozen=True, slots=True)
class EntropyMixing:
    """lambda in [0, 1] from Hn = H / ln(entropy_vocab_size), H the entropy of the hinted stream at temperature 1.

    Where the hint makes the model certain, it is followed; where many continuations remain, the model's own style is.
    The modes, linear being the paper's (arXiv 2602.12222) and the next two those of the authors' code:

        linear     clamp(beta Hn, 0, 1)
        sigmoid    1 / (1 + exp(-beta (Hn - center)))
        piecewise  0 up to Hn = low, 1 from Hn = high, linear between
        fixed      value. With 0 the hinted stream alone writes (answer-conditioned self-distillation); with 1, and
                   first_token_hinted off, the plain one (plain sampling).

    entropy_vocab_size: the authors take their model's padded number of rows.
    first_token_hinted: the first token comes from the hinted stream alone, as in the authors' code.

    Raises InputError for values outside their range.
    """

    entropy_vocab_size: int
    mode: MixingMode = "linear"
    beta: float = 3.0
    center: float = 0.5
    low: float = 0.3
    high: float = 0.7
    value: float | None = None
    first_token_hinted: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MIXING_MODES:
            raise InputError(f"mixing {self.mode!r} is none of {', '.join(MIXING_MODES)}")
        if self.entropy_vocab_size < 2:
            raise InputError(f"entropy vocabulary of {self.entropy_vocab_size}: pass a whole number from 2")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"mixing beta {self.beta}: pass a number from 0")
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"mixing from {self.low} to {self.high}: pass 0 <= low < high <= 1")
        if (self.mode == "fixed") != (self.value is not None):
            raise InputError("the mixing fixed, and no other one, needs a value for lambda: pass --mix-lambda")
        if self.value is not None and not 0 <= self.value <= 1:
            raise InputError(f"lambda {self.value}: pass a number from 0 to 1")

    def __call__(self, hinted_entropy: Tensor) -> Tensor:
        """lambda, fp32 [n], from H in nats, fp32 [n]."""
        share = hinted_entropy / math.log(self.entropy_vocab_size)
        if self.mode == "linear":
            return (self.beta * share).clamp(0, 1)
        if self.mode == "sigmoid":
            return torch.sigmoid(self.beta * (share - self.center))
        if self.mode == "piecewise":
            return ((share - self.low) / (self.high - self.low)).clamp(0, 1)
        return torch.full_like(share, self.value or 0.0)

    @property
    def has_beta(self) -> bool:
        return self.mode in ("linear", "sigmoid")

    def scaled(self, factor: float) -> EntropyMixing:
        """The same with beta times `factor`; without change where the mode has no beta."""
        return replace(self, beta=self.beta * factor) if self.has_beta else self

    def describe(self) -> dict[str, Any]:
        """What the mode uses, for manifests and reports."""
        used = {"sigmoid": ("beta", "center"), "linear": ("beta",), "piecewise": ("low", "high"), "fixed": ("value",)}
        return {
            "mode": self.mode,
            **{name: getattr(self, name) for name in used[self.mode]},
            "first_token": "hinted" if self.first_token_hinted else "mixed",
            "entropy_vocab_size": self.entropy_vocab_size,
        }

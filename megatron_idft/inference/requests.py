"""Requests to the decode engine, and its responses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.integer]
FinishReason = Literal["eos", "length", "context", "repetition"]


@dataclass(frozen=True, slots=True)
class Request:
    """One response to decode.

    Attributes:
        id: names the random draws together with the seed, so two requests of one call must not share both.
        prompt: int [n >= 1].
        hinted_prompt: int [m >= 1], the same question with a hint: a second stream, mixed with the first
            (hinted_decoding/); None: plain generation.
        seed: of the random draws.
        settings: how it is decoded; None: as the call says.
    """

    id: str
    prompt: Tokens
    hinted_prompt: Tokens | None = None
    seed: int = 0
    settings: DecodeSettings | None = None


class Mixing(Protocol):
    """How two streams become one distribution, proportional to hinted^s * plain^(1 - s), s being the hint share.

    The paper writes lambda for the share of the plain stream, 1 - s; in this project lambda is IDFT's schedule.
    """

    @property
    def first_token_hinted(self) -> bool:
        """Whether the first token comes from the hinted stream only."""

    def plain_share(self, hinted_entropy: Tensor) -> Tensor:
        """1 - s in [0, 1] from the entropy of the hinted stream, in nats; both fp32 [n]."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from a distribution.

    Attributes:
        temperature: 0 takes the most probable token (of equals the one with the smallest id).
        top_p: the smallest set of most probable tokens with at least this mass.
        top_k: so many most probable tokens; 0: all.
        cut_before_temperature: top_p and top_k cut the distribution at temperature 1, as in Hinted Decoding; else the
            tempered one, as in Megatron and vLLM.

    Raises:
        ValueError: a value lies outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    cut_before_temperature: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: pass a number from 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: pass a number above 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: pass a whole number from 0")

    @property
    def cuts(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, slots=True)
class Repetition:
    """Ends a response in which some n-gram stands `count` times; looked for every `every` tokens."""

    ngram: int = 30
    count: int = 5
    every: int = 100


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a response ends.

    Attributes:
        stop_ids: the first of these ends the response.
        max_tokens: the longest response.
        must_fit: tokens for which there must be memory; None: `max_tokens`. A response of more ends where that does.
        stop_on_first_token: also as the very first token, which the authors' code ignores.
        repetition: None: never looked for.
        splitter: text after which the hinted stream is dropped; searched in the joined texts of the single tokens.
        piece: token id -> its text; needed with a splitter.
    """

    stop_ids: Collection[int]
    max_tokens: int
    stop_on_first_token: bool = True
    repetition: Repetition | None = None
    splitter: str | None = None
    piece: Callable[[int], str] | None = None
    must_fit: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How responses are decoded. mixing is needed where a request has a hinted prompt."""

    sampling: Sampling
    stopping: Stopping
    mixing: Mixing | None = None


@dataclass(slots=True)
class Completion:
    """A response, with the numbers of each of its n tokens from the step that drew it.

    Attributes:
        token_ids: int32 [n], with the stop token if one ended the response.
        log_prob, entropy: fp32 [n], of the token and of the distribution under the plain prompt, temperature 1, nats,
            nothing cut: their sum is phi.
        hint_share: fp32 [n], the share of the hinted stream: 0 where only the plain one ran.
        hinted_entropy: fp32 [n], nats; NaN where there was no hinted stream.
        split_at: the number of tokens after which the splitter had been written; None if it never was.
    """

    request: Request
    token_ids: NDArray[np.int32]
    finish_reason: FinishReason
    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    hint_share: NDArray[np.float32] = field(repr=False)
    hinted_entropy: NDArray[np.float32] = field(repr=False)
    split_at: int | None = None

    @property
    def phi(self) -> NDArray[np.float32]:
        return self.log_prob + self.entropy

"""Hinted Decoding (arXiv 2602.12222, as the authors' demo runs it) by the book: one sequence, no cache, float64.

Every token costs two passes over whole sequences, whose logits come from transformers. Nothing is shared with the
engine but the uniform draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_idft.inference.draws import draw

Logits = Callable[[Sequence[int]], np.ndarray]  # ids -> [V] float64 for the next token
NEAR_TIE = 1e-4  # nats; fp32 models differ by about 1e-5


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def entropy(log_probs: np.ndarray) -> float:
    return float(-(np.exp(log_probs) * log_probs).sum())


def cut_and_temper(
    scores: np.ndarray, temperature: float, top_p: float, top_k: int, cut_before_temperature: bool
) -> np.ndarray:
    """[V] probabilities of the token that is drawn. scores: log of something proportional to the distribution."""
    if temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    cut = np.exp(log_softmax(scores if cut_before_temperature else scores / temperature))
    order = np.lexsort((np.arange(len(cut)), -cut))
    before = np.concatenate([[0.0], np.cumsum(cut[order])[:-1]])
    kept = order[before < top_p]
    if top_k:
        kept = kept[:top_k]
    probs = np.zeros(len(scores))
    probs[kept] = np.exp((scores[kept] - scores.max()) / temperature)
    return probs / probs.sum()


def invert(probs: np.ndarray, uniform: float) -> int:
    """The token, in the order of ids, at which the cumulative distribution passes the draw."""
    return int(np.searchsorted(np.cumsum(probs) / probs.sum(), uniform, side="right"))


@dataclass
class Reference:
    """The response, and what was known of each token. near_ties: steps at which rounding may decide."""

    tokens: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    hint_share: list[float] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)


def decode(
    logits: Logits,
    prompt: Sequence[int],
    hinted_prompt: Sequence[int] | None,
    hint_share: Callable[[float], float],
    *,
    identity: str,
    seed: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    cut_before_temperature: bool = True,
    split_after: Sequence[int] = (),
    follow: Sequence[int] = (),
) -> Reference:
    """follow: the tokens that another implementation chose; where a near tie decides, its choice is continued."""
    found = Reference()
    hinted = hinted_prompt is not None
    for step in range(max_tokens):
        plain = log_softmax(logits([*prompt, *found.tokens]))
        share, scores = 0.0, plain
        if hinted:
            other = log_softmax(logits([*hinted_prompt, *found.tokens]))
            share = 1.0 if step == 0 else hint_share(entropy(other))
            scores = share * other + (1 - share) * plain
        probs = cut_and_temper(scores, temperature, top_p, top_k, cut_before_temperature)
        token = invert(probs, draw(seed, identity, step))
        if step < len(follow) and follow[step] != token and _near(scores, probs, token, follow[step], temperature):
            found.near_ties.append(step)
            token = follow[step]
        found.tokens.append(token)
        found.log_prob.append(float(plain[token]))
        found.entropy.append(entropy(plain))
        found.hint_share.append(share)
        if token in split_after:
            hinted = False
        if token in stop_ids and step > 0:
            break
    return found


def _near(scores: np.ndarray, probs: np.ndarray, token: int, other: int, temperature: float) -> bool:
    if temperature == 0:
        return abs(scores[token] - scores[other]) < NEAR_TIE
    # Neighbours in the cumulative distribution, with a draw between them.
    between = probs[min(token, other) + 1 : max(token, other)]
    return float(between.sum()) < NEAR_TIE

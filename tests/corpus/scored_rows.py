"""Rows as `score` writes them, drawn from a known model, so that the right answer of a report is known.

The model: at every position a distribution over `VOCABULARY` of its own, nearly certain at most positions and wide at
few, as language models are. log_prob, entropy and phi are exact.
"""

import hashlib

import numpy as np

VOCABULARY = (
    " the", " a", " of", " to", " is", " so", " we", " have", " x", " =", " 2", " +", "\n", " then", " answer", ".",
    " sum", " each", " and", " with", " angle", " let", " therefore", ",", " number", " prime", " cannot", " find",
    " first", " side", " length", " it",
)  # fmt: skip
END = "<|im_end|>"
END_ID = len(VOCABULARY)
_MEANS = {"log_prob_mean": "log_prob", "entropy_mean": "entropy", "phi_mean": "phi"}


def digest(text):
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:32]


def row_of(index, log_prob, entropy, token_ids, *, name="train", source=None, ends_turn=True, prompt=None, **changes):
    """The row of a record with these scores. changes: whatever column should differ."""
    log_prob, entropy = np.asarray(log_prob, np.float64), np.asarray(entropy, np.float64)
    phi = log_prob + entropy
    tokens = [END if i == END_ID else VOCABULARY[i % len(VOCABULARY)] for i in token_ids]
    text = "".join(tokens)
    row = {
        "id": f"{name}-{index}", "file": f"{name}.jsonl", "line": index + 1, "source": source, "num_prompt_tokens": 20,
        "num_tokens": len(phi), "truncated": False, "ends_turn": ends_turn, "template_markers": 0,
        "prompt_hash": digest(f"prompt {index}" if prompt is None else prompt), "response_hash": digest(text),
        "prompt_overlap": 0.0, "phi_std": float(phi.std()) if np.isfinite(phi).all() else float("nan"),
        "phi_sum": float(phi.sum()),
        "token_ids": list(token_ids), "tokens": tokens, "log_prob": log_prob.tolist(), "entropy": entropy.tolist(),
        "phi": phi.tolist(),
    }  # fmt: skip
    row |= {key: float(np.mean(row[column])) for key, column in _MEANS.items()}
    row |= {f"phi_below_{limit}": float((phi < -limit).mean()) for limit in (1, 3, 5)}
    row["worst_tokens"] = [
        {
            "position": 20 + int(i), "token_id": token_ids[i], "token": tokens[i],
            "context": "".join(tokens[max(0, i - 12) : i]), "phi": float(phi[i]), "log_prob": float(log_prob[i]),
            "entropy": float(entropy[i]),
        }
        for i in np.argsort(phi, kind="stable")[:5]
    ]  # fmt: skip
    return row | changes


def sampled_rows(count, *, seed=0, temperature=1.0, foreign=0.0, length=(24, 120), model=0.0, **columns):
    """Records whose tokens are drawn from the model at `temperature`.

    foreign: the share of tokens that are drawn uniformly instead, as if by another hand.
    model: how far the model that scores them has moved from the one that wrote them; the same tokens come at any value.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        n = int(rng.integers(*length))
        scale = np.where(rng.random(n) < 0.7, 5.0, 1.5)[:, None]
        logits = scale * rng.normal(size=(n, len(VOCABULARY)))
        chosen = _draw(rng, logits / temperature)
        uniform, other = rng.random(n) < foreign, rng.integers(0, len(VOCABULARY), n)
        chosen = np.where(uniform, other, chosen)
        moved = logits + model * rng.normal(size=logits.shape)
        log_p = moved - np.logaddexp.reduce(moved, axis=1, keepdims=True)
        entropy = -(np.exp(log_p) * log_p).sum(1)
        # The end of turn is certain where it stands, so that being chosen for what it is does not bias its phi.
        log_prob = np.append(log_p[np.arange(n), chosen], 0.0)
        yield row_of(index, log_prob, np.append(entropy, 0.0), [*chosen.tolist(), END_ID], **columns)


def without_lists(rows):
    """As `score` writes rows without columns per token."""
    for row in rows:
        yield {key: row[key] for key in row if key not in ("token_ids", "tokens", "log_prob", "entropy", "phi")}


def _draw(rng, logits):
    """One token for each row of logits (Gumbel's trick)."""
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)

"""Rows as `realign` writes them, drawn from a small known model: log_prob, entropy and phi are exact.

The plain stream is a distribution of its own at each position; the hinted stream is the same one with other noise.
"""

import numpy as np

WORDS = (" the", " a", " so", " we", " x", " =", " 2", " +", "\n", " then", ".", " sum", " answer", ",", " is", " it")


def scores(rng, count, *, hinted=False, slope=3.0, temperature=1.0, foreign=0.0, alone_from=None):
    """Tokens drawn at `temperature` and their scores; fp32, as in the rows. foreign: share drawn uniformly instead."""
    logits = np.where(rng.random(count) < 0.6, 5.0, 1.5)[:, None] * rng.normal(size=(count, len(WORDS)))
    plain = _log_softmax(logits)
    entropy = -(np.exp(plain) * plain).sum(1)
    share, hinted_entropy, mixed = np.zeros(count), np.full(count, np.nan), plain
    if hinted:
        other = _log_softmax(logits + rng.normal(size=logits.shape))
        hinted_entropy = -(np.exp(other) * other).sum(1)
        share = 1 - np.clip(slope * hinted_entropy / np.log(len(WORDS)), 0, 1)
        share[0] = 1
        if alone_from is not None:
            share[alone_from:], hinted_entropy[alone_from:] = 0, np.nan
        mixed = share[:, None] * other + (1 - share)[:, None] * plain
    chosen = (mixed / temperature + rng.gumbel(size=logits.shape)).argmax(1)
    chosen = np.where(rng.random(count) < foreign, rng.integers(0, len(WORDS), count), chosen)
    log_prob = plain[np.arange(count), chosen]
    arrays = {"log_prob": log_prob, "entropy": entropy, "phi": log_prob + entropy, "hint_share": share}
    arrays["hinted_entropy"] = hinted_entropy
    return {"token_ids": chosen} | {name: values.astype(np.float32) for name, values in arrays.items()}


def sums(drawn, prefix=""):
    phi = drawn["phi"].astype(np.float64)
    values = {"num_tokens": len(phi), "phi_sum": phi.sum(), "phi_squared_sum": np.square(phi).sum()}
    values |= {f"{key}_sum": drawn[key].astype(np.float64).sum() for key in ("log_prob", "entropy")}
    values |= {f"phi_below_{limit}": int((phi < -limit).sum()) for limit in (1, 3, 5)}
    return {prefix + key: value if isinstance(value, int) else float(value) for key, value in values.items()}


def candidate(drawn, stage, **columns):
    two = np.isfinite(drawn["hinted_entropy"])
    shares = drawn["hint_share"][two]
    row = {
        "stage": stage, "seed": 0, "slope": None if stage == "rollout" else 3.0, "accepted": False,
        "rejected_because": None, "verdict": "right", "verified_by": "number", "extracted": "4", "leak": None,
        "finish_reason": "eos", "text": text(drawn), "more_room": False, "split_at": None,
        "hint_share_mean": float(shares.mean()) if len(shares) else None,
        "hint_share_min": float(shares.min()) if len(shares) else None,
    }  # fmt: skip
    return row | sums(drawn) | columns


def text(drawn):
    return "".join(WORDS[i] for i in drawn["token_ids"])


def turn(original, candidates=(), stage=None, accepted=None, **columns):
    """accepted: the scores of the accepted candidate, None where there is none."""
    row = {
        "message": 1, "stage": stage, "reason": None, "num_prompt_tokens": 9, "hints": [],
        "original_text": None if original is None else text(original),
        "candidates": list(candidates), "token_ids": [], "tokens": [], "hint_share": [], "phi": [], "entropy": [],
        "hinted_entropy": [],
    }  # fmt: skip
    if original is not None:
        row |= sums(original, "original_")
    if accepted is not None:
        row |= {key: accepted[key].tolist() for key in accepted if key != "log_prob"}
        row["tokens"] = [WORDS[i] for i in accepted["token_ids"]]
    return row | columns


def record(index, status, turns, *, source=None, reason=None, **columns):
    row = {
        "index": index, "id": f"r{index}", "file": "train.jsonl", "line": index + 1, "source": source,
        "status": status, "reason": reason, "record": "{}" if status == "kept" else None, "token_ids": None,
        "loss_mask": None, "turns": turns,
    }  # fmt: skip
    return row | columns


def realigned_rows(count, *, seed=0, temperature=1.0, sources=("algebra", "geometry", None), turns=(1, 3)):
    """A corpus with every fate: kept by each stage or as the original, dropped, failed; some with two turns.

    temperature: of the rollouts.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        source = sources[index % len(sources)]
        if rng.random() < 0.06:
            yield record(index, "error", None, source=source, reason="the prompt is longer than the context")
            continue
        parts = [_turn(rng, temperature, 2 * number + 1) for number in range(rng.integers(*turns))]
        dropped = any(part["stage"] is None for part in parts)
        if dropped:
            for part in parts:
                for one in part["candidates"]:
                    one["accepted"] = False
        reason = next((part["reason"] for part in parts if part["stage"] is None), None)
        yield record(index, "dropped" if dropped else "kept", parts, source=source, reason=reason)


def _turn(rng, temperature, message):
    original = scores(rng, int(rng.integers(20, 80)), foreign=0.15)
    candidates, fate = [], rng.random()
    for seed in range(2):
        drawn = scores(rng, int(rng.integers(20, 60)), temperature=temperature)
        right = fate < 0.35 and seed == 1
        verdict = "right" if right else ("wrong", "unknown", None)[rng.integers(3)]
        because = None if right else "wrong" if verdict == "wrong" else "unverified"
        candidates.append(candidate(drawn, "rollout", seed=seed, verdict=verdict, rejected_because=because))
        if right:
            candidates[-1]["accepted"] = True
            return turn(original, candidates, "rollout", drawn, message=message)
    for stage, limit in (("hinted", 0.6), ("second_hint", 0.7), ("retry", 0.8)):
        length = int(rng.integers(20, 60))
        split_at = int(rng.integers(5, length)) if rng.random() < 0.7 else None
        drawn = scores(rng, length, hinted=True, temperature=0.5, alone_from=split_at)
        right, ends = fate < limit, rng.random() < 0.9
        columns = {"split_at": split_at, "accepted": right, "verdict": "right" if right else "wrong"}
        if not right:
            columns |= {"rejected_because": "wrong" if ends else "unfinished"}
            columns |= {"finish_reason": "eos" if ends else "repetition", "leak": None if ends else "reference answer"}
        candidates.append(candidate(drawn, stage, **columns))
        if right:
            return turn(original, candidates, stage, drawn, message=message)
    if fate < 0.88:
        return turn(original, candidates, "original", reason="no candidate was right", message=message)
    return turn(original, candidates, None, reason="no candidate was right", message=message)


def _log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

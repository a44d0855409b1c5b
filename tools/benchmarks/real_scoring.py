"""Scoring SmolLM2's shape beside a plain transformers loop over the same batches; `scoring.py --shape smollm2` runs it.

One process, one model's weights in both, real records, fp32:

    scoring        what `score` does: statistics of the response's tokens, rows with their worst tokens
    transformers   inference_mode, SDPA, the same batches padded on the right with an attention mask, `logits_to_keep`
                   from the first token that any record of the batch needs, log_softmax, entropy, gather
    by hand        the same, but its base model and then its output layer for the needed tokens only, which its
                   `forward` cannot do

The ceiling is the model's matrix products alone, as torch multiplies them, of the tokens without their padding.

Expected before the first run. A token costs 0.212 GFLOP in the layers and 0.057 in the output layer, if it is one of
the response, as about half of them are. At 130 GFLOP/s on a core the products of a token take 1.8 ms; the loop should
reach 70 % of that: attention by SDPA takes a tenth, rotary embeddings, norms and SwiGLU in single operations another,
padding 5 to 10 %. Scoring does the same products, and without padding and with half of the output layer's work should
be 1.2 times as fast as the loop, the goal, and 1.1 times the loop by hand. More than 1.4 times is not possible.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import real_model
import torch
from real_model import Conversation

SPEEDUP_GOAL = 1.2


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = real_model.model_folder(options.hf_model, options.shape, scratch)
        scorer = real_model.load_scorer(folder, scratch, options.tokens_per_batch)
        model = real_model.load_transformers(folder)
        records = real_model.conversations(options, options.records, model.config.vocab_size)
        result = measure(scorer, model, records, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(scorer: Any, model: Any, records: list[Conversation], options: argparse.Namespace) -> dict[str, Any]:
    sequences, masks = [record.whole for record in records], [record.mask for record in records]
    batches = scorer._batches(sequences)
    variants: dict[str, Callable[[], object]] = {
        "scoring": lambda: score(scorer, sequences, masks),
        "transformers": lambda: [keeping(model, *batch(sequences, masks, indices)) for indices in batches],
        "by hand": lambda: [by_hand(model, *batch(sequences, masks, indices)) for indices in batches],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(options.rounds + 1):
        for name, variant in variants.items():
            found = real_model.timed(variant)
            if number > 0:  # the first loads and allocates
                times[name].append(found)
    tokens, fed = sum(map(len, sequences)), sum(len(sequence) - 1 for sequence in sequences)
    read = int(sum(mask.sum() for mask in masks))
    products = real_model.Products(model)
    least = sum(
        products.seconds(sum(len(sequences[i]) - 1 for i in indices), sum(int(masks[i].sum()) for i in indices), 2)
        for indices in batches
    )
    padded = sum(len(indices) * max(len(sequences[i]) - 1 for i in indices) for indices in batches)
    print(
        f"{len(records)} records, {tokens:,} tokens, {read:,} of responses, {len(batches)} batches with"
        f" {padded / fed - 1:.1%} of padding, {options.rounds} rounds, {torch.get_num_threads()} threads"
    )
    wall, cpu = ({name: statistics.median(t[i] for t in values) for name, values in times.items()} for i in (0, 1))
    for name in variants:
        print(
            f"{name:14}{tokens / wall[name]:10,.0f} tokens/s {least / wall[name]:6.0%} of the products alone"
            f" {tokens / cpu[name]:10,.0f} tokens/s of processor time"
        )
    ratios = {other: statistics.median(pairwise(times, other)) for other in ("transformers", "by hand")}
    print(f"scoring at {ratios['by hand']:.2f} times the loop by hand")
    return {
        "benchmark": "scoring",
        "shape": options.shape,
        **real_model.surroundings(options),
        "options": {name: getattr(options, name) for name in ("records", "tokens_per_batch", "rounds")},
        "tokens": tokens,
        "response_tokens": read,
        "batches": [len(indices) for indices in batches],
        "padding": padded / fed - 1,
        "seconds": {name: [t[0] for t in values] for name, values in times.items()},
        "cpu_seconds": {name: [t[1] for t in values] for name, values in times.items()},
        "products_seconds": least,
        "tokens_per_second": {name: tokens / value for name, value in wall.items()},
        "share_of_products": {name: least / value for name, value in wall.items()},
        "times_by_hand": ratios["by hand"],
        "goals": [real_model.goal("scoring against a transformers loop", ratios["transformers"], SPEEDUP_GOAL)],
    }


def pairwise(times: dict[str, list[tuple[float, float]]], other: str) -> list[float]:
    """Of each round, the other's seconds over scoring's."""
    return [b[0] / a[0] for a, b in zip(times["scoring"], times[other], strict=True)]


def score(scorer: Any, sequences: list[Any], masks: list[Any]) -> None:
    from megatron_idft.corpus.scores.rows import scored_record

    for ids, mask, (log_prob, entropy) in zip(sequences, masks, scorer.score(sequences, masks), strict=True):
        scored_record(ids, mask, log_prob, entropy, decode=lambda ids: "", end_of_turn_ids=[0], special_ids=[0])


def batch(sequences: list[Any], masks: list[Any], indices: list[int]) -> tuple[torch.Tensor, ...]:
    """tokens, attention mask, labels, and where labels are needed, each [b, s]."""
    shape = len(indices), max(len(sequences[i]) for i in indices) - 1
    tokens, seen, labels = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    needed = np.zeros(shape, dtype=bool)
    for row, i in enumerate(indices):
        n = len(sequences[i]) - 1
        tokens[row, :n], seen[row, :n], labels[row, :n] = sequences[i][:-1], 1, sequences[i][1:]
        needed[row, :n] = masks[i][1:]
    return tuple(map(torch.from_numpy, (tokens, seen, labels, needed)))


@torch.inference_mode()
def keeping(model: Any, tokens: torch.Tensor, seen: torch.Tensor, labels: torch.Tensor, needed: torch.Tensor) -> Any:
    first = int(needed.any(0).nonzero()[0])
    keep = tokens.shape[1] - first
    logits = model(tokens, attention_mask=seen, use_cache=False, logits_to_keep=keep).logits
    return [values[needed[:, first:]].numpy() for values in of_logits(logits, labels[:, first:])]


@torch.inference_mode()
def by_hand(model: Any, tokens: torch.Tensor, seen: torch.Tensor, labels: torch.Tensor, needed: torch.Tensor) -> Any:
    states = model.model(tokens, attention_mask=seen, use_cache=False).last_hidden_state
    return [values.numpy() for values in of_logits(model.lm_head(states[needed]), labels[needed])]


def of_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(-1, labels[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)

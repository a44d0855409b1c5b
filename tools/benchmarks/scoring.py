"""Tokens per second of scoring on this machine, beside the same forward pass without it and a Hugging Face loop.

Of a narrow model, and with `--shape smollm2` of SmolLM2-135M's (real_scoring.py says what is measured then). Three
variants over the same records and the same weights, a randomly initialised Qwen2-like model, in one process:

    scoring        what `score` does: batches of like length, the hook's statistics of the trained two thirds of the
                   tokens, rows with their worst tokens
    forward        the same batches through the same Megatron model with its own cross-entropy of all tokens as the
                   loss, nothing else
    hugging_face   transformers, one record at a time: logits, log_softmax, entropy, gather

Expected before the first run: scoring reaches at least 95 % of the forward's tokens per second, the goal, where the
model's products outweigh the statistics; on a CPU and a narrow model the vocabulary's share of the work is large, so
this is the hard case. The loop is slower by what batches gain, on a CPU perhaps 1.5 times.

The variants take turns, record set by record set; the median over the rounds counts. Goals are printed as hit or MISS.

    torchrun --standalone --nproc-per-node 1 tools/benchmarks/scoring.py --json RESULTS.json
        [--shape smollm2 --hf-model DIR --records-file FILE]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

import real_model
import real_scoring

MIN_SHARE_OF_FORWARD = 0.95


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("narrow", "smollm2", "smollm2-smoke"), default="narrow")
    real_model.add_arguments(parser)
    parser.add_argument("--records", type=int, default=None, help="default: 96, of smollm2 16")
    parser.add_argument("--longest", type=int, default=192, help="tokens; lengths are drawn from 16 to this")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=None, help="default: 5, of smollm2 3")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records, rounds = (96, 5) if options.shape == "narrow" else (16, 3)
    options.records, options.rounds = options.records or records, options.rounds or rounds
    return options


def save_model(options: argparse.Namespace, folder: Path) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=real_model.POSITIONS,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def main() -> None:
    options = parse_arguments()
    if options.shape != "narrow":
        real_scoring.main(options)
        return
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, options.longest + 1, options.records)
    sequences = [rng.integers(0, options.vocab, n) for n in lengths]
    masks = [np.arange(n) >= n // 3 for n in lengths]
    with tempfile.TemporaryDirectory() as scratch:
        hugging_face_model = save_model(options, Path(scratch) / "model")
        scorer = real_model.load_scorer(Path(scratch) / "model", Path(scratch), options.tokens_per_batch)
        variants: dict[str, Callable[[], None]] = {
            "scoring": lambda: real_scoring.score(scorer, sequences, masks),
            "forward": lambda: forward(scorer, sequences),
            "hugging_face": lambda: hugging_face(hugging_face_model, sequences, masks),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(options.rounds + 1):
            for name, variant in variants.items():
                start = time.perf_counter()
                variant()
                if round_number > 0:  # the first loads and allocates
                    seconds[name].append(time.perf_counter() - start)
    tokens = int(lengths.sum())
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    share, speedup = rates["scoring"] / rates["forward"], rates["scoring"] / rates["hugging_face"]
    print(f"{options.records} records, {tokens:,} tokens, {options.rounds} rounds, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        print(f"{name:14}{rate:12,.0f} tokens/s")
    hit = share >= MIN_SHARE_OF_FORWARD
    print(f"{'hit' if hit else 'MISS'}: scoring at {share:.3f} of the forward (goal {MIN_SHARE_OF_FORWARD})")
    print(f"scoring at {speedup:.2f} times the Hugging Face loop")
    if options.json:
        result = {
            "benchmark": "scoring",
            "date": datetime.date.today().isoformat(),
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "hf_model", "records_file")},
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": rates,
            "share_of_forward": share,
            "goal_hit": hit,
            "times_hugging_face_loop": speedup,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def forward(scorer: Any, sequences: list[np.ndarray]) -> None:
    for hook in scorer.hooks:
        hook.detach()  # Megatron's own cross-entropy is back
    try:
        for batch in scorer._tensors(sequences, scorer._batches(sequences)):
            with scorer.fed(batch):
                scorer.model[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"].clamp(min=0)).sum()
    finally:
        for hook in scorer.hooks:
            hook.attach()


@torch.no_grad()
def hugging_face(model: Any, sequences: list[np.ndarray], masks: list[np.ndarray]) -> None:
    for ids, mask in zip(sequences, masks, strict=True):
        tokens = torch.from_numpy(ids)
        positions = torch.from_numpy(np.flatnonzero(mask[1:]))
        log_probs = model(tokens[None]).logits[0, positions].float().log_softmax(-1)
        log_probs.gather(-1, tokens[positions + 1, None]).numpy()
        (-(log_probs.exp() * log_probs).sum(-1)).numpy()


if __name__ == "__main__":
    main()

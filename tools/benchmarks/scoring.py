"""Tokens per second of scoring on this machine, beside the same forward pass without it and a Hugging Face loop.

Three variants over the same records and the same weights, a randomly initialised Qwen2-like model, in one process:

    scoring        what `score` does: batches of like length, the hook's statistics, rows with their worst tokens
    forward        the same batches through the same Megatron model with its own cross-entropy as the loss, nothing else
    hugging_face   transformers, one record at a time: logits, log_softmax, entropy, gather

Expected before the first run: scoring reaches at least 95 % of the forward's tokens per second, the goal, where the
model's products outweigh the statistics; on a CPU and a narrow model the vocabulary's share of the work is large, so
this is the hard case. The loop is slower by what batches gain, on a CPU perhaps 1.5 times.

The variants take turns, record set by record set; the median over the rounds counts. Goals are printed as hit or MISS.

    torchrun --standalone --nproc-per-node 1 tools/benchmarks/scoring.py --json RESULTS.json
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

MIN_SHARE_OF_FORWARD = 0.95


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--longest", type=int, default=192, help="tokens; lengths are drawn from 16 to this")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


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
        max_position_embeddings=options.longest,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def load_scorer(options: argparse.Namespace, folder: Path) -> Any:
    """The scorer of `score --hf-model`, set up by the program itself."""
    from megatron_idft.integration.offline import score as scoring_program
    from megatron_idft.integration.platform.hf_model import expand
    from megatron_idft.integration.platform.start import prepare_process

    flags = f"--hf-model {folder} --tokenizer-model unused.model --data unused --output unused"
    flags += f" --seq-length {options.longest} --tokens-per-batch {options.tokens_per_batch}"
    flags += " --tokenizer-type NullTokenizer --vocab-size " + str(options.vocab - 1)
    prepare_process("scoring benchmark", expand(flags.split()), force_cpu=not torch.cuda.is_available())
    args = scoring_program._parse()
    return scoring_program._load_scorer(args)


def main() -> None:
    options = parse_arguments()
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, options.longest + 1, options.records)
    sequences = [rng.integers(0, options.vocab, n) for n in lengths]
    masks = [np.arange(n) >= n // 3 for n in lengths]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        hugging_face_model = save_model(options, folder)
        sys.argv = sys.argv[:1]
        scorer = load_scorer(options, folder)
        variants: dict[str, Callable[[], None]] = {
            "scoring": lambda: score(scorer, sequences, masks),
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
            "options": {k: v for k, v in vars(options).items() if k != "json"},
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": rates,
            "share_of_forward": share,
            "goal_hit": hit,
            "times_hugging_face_loop": speedup,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def score(scorer: Any, sequences: list[np.ndarray], masks: list[np.ndarray]) -> None:
    from megatron_idft.corpus.scores.rows import scored_record

    for ids, mask, (log_prob, entropy) in zip(sequences, masks, scorer.score(sequences), strict=True):
        scored_record(ids, mask, log_prob, entropy, decode=lambda ids: "", end_of_turn_ids=[0], special_ids=[0])


@torch.no_grad()
def forward(scorer: Any, sequences: list[np.ndarray]) -> None:
    for hook in scorer.hooks:
        hook.detach()  # Megatron's own cross-entropy is back
    try:
        for batch in scorer._tensors(sequences, scorer._batches(sequences)):
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

"""Decoding SmolLM2's shape beside `transformers.generate` with the same rows; `decoding.py --shape smollm2` runs it.

One process, one model's weights in both, prompts of real records, fp32, no stop tokens: every row gets the same number
of new tokens on both sides. generate has the prompts padded on the left in one static batch, its default cache, SDPA.

    greedy     own responses, the most probable token
    sampled    own responses at temperature 1 from the whole distribution, as `score --calibrate` draws them
    pairs      Hinted Decoding: two rows for each response, mixed at every step, temperature 0.3 and top-p 0.95.
               generate cannot mix; beside it stands generate with as many rows, half of them with the hint, which
               draws a token for each row and mixes nothing

The engine also finds each token's log-probability and entropy, which generate does not. They take turns, round by
round. A step's time is the median between two tokens; whole responses count the prompts, too. Floors of a step: reading
the weights once, and the model's matrix products alone at as many rows, as torch multiplies them.

Expected once the products alone and a first baseline had been measured. The weights are 538 MB, about 45 ms a step to
read at 12 GB/s on one core. torch's products with 8 rows were measured at 105 to 150 ms, as it re-orders the weights in
each call; with oneDNN's copies of them, at 65. generate should add 60 ms to its products: attention over keys and
values that it copies in each step (46 kB a token and row), small operations from Python. The engine writes keys and
values in place and adds 40 ms. So about 1.9 times at 8 rows, 1.4 at 32, where the products themselves take most of the
time, and about 1 at one row. With top-p, generate sorts 49,152 numbers for each row, some 4 ms each: pairs more than
twice. The goal is 1.5 at each number of rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import real_model
import torch
from real_model import Conversation

SPEEDUP_GOAL = 1.5
ROWS, TOKENS, ROUNDS = (8, 32), 64, 1
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "pairs": {"temperature": 0.3, "top_p": 0.95},
}


class Decoded(NamedTuple):
    """Token ids [rows, tokens], and when each step ended."""

    ids: np.ndarray
    stamps: list[float]


class Linear:
    """Share of the plain stream: clamp(3 H / ln V, 0, 1), the paper's form."""

    first_token_hinted = True

    def __init__(self, vocab: int) -> None:
        self.scale = 3 / float(np.log(vocab))

    def plain_share(self, hinted_entropy: torch.Tensor) -> torch.Tensor:
        return (self.scale * hinted_entropy).clamp(0, 1)


def main(options: argparse.Namespace) -> int:
    from megatron_idft.inference.engine import DecodeEngine

    smoke = options.shape == "smollm2-smoke"
    all_rows = tuple(options.rows or ((4,) if smoke else ROWS))
    tokens, rounds = (6 if smoke else TOKENS), options.rounds or ROUNDS
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = real_model.model_folder(options.hf_model, options.shape, scratch)
        scorer = real_model.load_scorer(folder, scratch, 2048)
        model = real_model.load_transformers(folder)
        vocab = model.config.vocab_size
        engine = DecodeEngine(scorer.model, vocab, max_positions=real_model.POSITIONS, max_rows=max(all_rows))
        records = real_model.conversations(options, max(all_rows), vocab)
        print(engine.describe(), flush=True)
        products = real_model.Products(model)
        result: dict[str, Any] = {
            "benchmark": "decoding",
            "shape": options.shape,
            **real_model.surroundings(options),
            "new_tokens": tokens,
            "rounds": rounds,
            "engine": engine.describe(),
            "weights_bytes": products.bytes,
            "weights_read_ms": 1e3 * products.read_seconds(),
            "rows": {},
            "goals": [],
        }
        options.out.mkdir(parents=True, exist_ok=True)
        for rows in all_rows:
            result["rows"][rows] = found = {"products_ms": 1e3 * products.seconds(rows, rows)}
            print(
                f"{rows} rows: a step's products alone take {found['products_ms']:.1f} ms, reading the weights"
                f" {result['weights_read_ms']:.1f} ms",
                flush=True,
            )
            for kind in KINDS:
                if kind != "pairs" or rows % 2 == 0:
                    found[kind] = figures = measure(engine, model, records[:rows], kind, tokens, rounds)
                    result["goals"].append(show(kind, rows, figures))
                    (options.out / "decoding.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(
    engine: Any, model: Any, records: list[Conversation], kind: str, tokens: int, rounds: int
) -> dict[str, Any]:
    programs: dict[str, Callable[[int], Decoded]] = {
        "engine": lambda n: run_engine(engine, records, kind, n),
        "generate": lambda n: run_generate(model, records, kind, n),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    steps: dict[str, list[float]] = {name: [] for name in programs}
    last: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        for name, program in programs.items():
            decoded: list[Decoded] = []
            length = 3 if number == 0 else tokens  # the first allocates
            found = real_model.timed(lambda: decoded.append(program(length)))  # noqa: B023 - called at once
            if number > 0:
                times[name].append(found)
                steps[name] += np.diff(decoded[0].stamps).tolist()
                last[name] = decoded[0].ids
    step = {name: statistics.median(values) for name, values in steps.items()}
    whole = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    result = {
        "seconds": {name: [wall for wall, _ in values] for name, values in times.items()},
        "cpu_seconds": {name: [cpu for _, cpu in values] for name, values in times.items()},
        "step_ms": {name: 1e3 * value for name, value in step.items()},
        "row_tokens_per_second": {name: len(records) * tokens / value for name, value in whole.items()},
        "times_generate_step": step["generate"] / step["engine"],
        "times_generate": statistics.median(
            b / a for (a, _), (b, _) in zip(times["engine"], times["generate"], strict=True)
        ),
    }
    if kind == "greedy":  # the same work: rounding decides between near equals, and then the rest differs
        result["equal_rows"] = int((last["engine"] == last["generate"]).all(1).sum())
    return result


def show(kind: str, rows: int, figures: dict[str, Any]) -> dict[str, Any]:
    for name, value in figures["step_ms"].items():
        print(
            f"  {kind:8}{name:10}{value:8.1f} ms a step, {figures['row_tokens_per_second'][name]:8,.0f} tokens/s of all"
            f" rows with prompts, {statistics.median(figures['cpu_seconds'][name]):.1f} s of processor time",
            flush=True,
        )
    if "equal_rows" in figures:
        print(f"  {figures['equal_rows']} of {rows} rows have the same tokens", flush=True)
    return real_model.goal(f"{kind}, {rows} rows, against generate", figures["times_generate"], SPEEDUP_GOAL)


def run_engine(engine: Any, records: list[Conversation], kind: str, tokens: int) -> Decoded:
    from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping

    paired = kind == "pairs"
    some = records[: len(records) // 2] if paired else records
    requests = [Request(str(i), each.prompt, each.hinted if paired else None) for i, each in enumerate(some)]
    sampling = Sampling(**KINDS[kind], cut_before_temperature=paired)
    stamps: list[float] = []
    append = engine._append

    def stamped(sequence: Any, *rest: Any) -> Any:
        if sequence.request is requests[0]:
            stamps.append(time.perf_counter())
        return append(sequence, *rest)

    engine._append = stamped
    try:
        settings = DecodeSettings(sampling, Stopping((), tokens), Linear(engine.vocab_size))
        engine.forget_prompts()
        found = {completion.request.id: completion.token_ids for completion in engine.decode(requests, settings)}
    finally:
        del engine._append
    return Decoded(np.stack([found[request.id] for request in requests]), stamps)


@torch.inference_mode()
def run_generate(model: Any, records: list[Conversation], kind: str, tokens: int) -> Decoded:
    from transformers import StoppingCriteria

    some = records[: len(records) // 2] if kind == "pairs" else records
    prompts = [each.prompt for each in some] + ([each.hinted for each in some] if kind == "pairs" else [])
    longest = max(map(len, prompts))
    ids, seen = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], seen[row, longest - len(prompt) :] = prompt, 1
    stamps: list[float] = []

    class Stamp(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    drawn = {"do_sample": True, "top_k": 0, **KINDS[kind]} if KINDS[kind]["temperature"] else {"do_sample": False}
    out = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(seen),
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[Stamp()],
        **drawn,
    )
    assert out.shape == (len(prompts), longest + tokens)
    return Decoded(out[:, longest:].numpy(), stamps)

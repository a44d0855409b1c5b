"""Decoding SmolLM2's shape beside `transformers.generate` with the same rows; `decoding.py --shape smollm2` runs it.

One process, one model's weights in both, prompts of real records, fp32. generate has the prompts padded on the left in
one static batch, its default cache, SDPA. First N responses at once, no stop tokens: every row gets the same number of
new tokens on both sides.

    greedy     own responses, the most probable token
    sampled    own responses at temperature 1 from the whole distribution, as `score --calibrate` draws them
    cut        own responses at temperature 0.3 and top-p 0.95: one stream, drawn as Hinted Decoding draws
    pairs      Hinted Decoding: two rows for each of the N responses, mixed at every step, drawn in the same way.
               generate cannot mix; beside it stands generate with as many rows, half of them with the hint, which
               draws a token for each row and mixes nothing

Then real work: 64 own responses to their natural ends (end of turn, or the limit), 32 at once, drawn as `cut`. The
engine gives the rows of a response that has ended to the next one; generate waits for the longest of each batch of 32.
The engine runs first; generate is then made to end each row after as many tokens, so both do the same requests at the
same lengths. At last as many responses of Hinted Decoding to their natural ends, by the engine.

The engine also finds each token's log-probability and entropy, which generate does not. They take turns, round by
round. A step's time is the median between two tokens; the time of prompts is that of the forward passes over more than
one token a row; whole responses count both. Tokens are those of responses; row tokens count both rows of a pair. Floors
of a step: reading the weights once, and the model's matrix products alone at as many rows, as torch multiplies them and
as the engine does, with copies that oneDNN has re-ordered. Where products are bound by arithmetic, two streams cost up
to twice one: their ratio is printed as the bound of the two streams' tokens/s.

Expected once the products alone had been measured on one core beside other programs (milliseconds of processor time):
8 rows 51, 32 rows 93, 64 rows 143, torch's own 77, 110, 169. Attention reads 46 kB a token and row. With the layers
computed from their weights the engine adds some 15 to its products at 8 rows, 50 at 32; generate adds 35 and 90 to
torch's. So one stream beside generate about 1.6 times at 8 rows and 1.4 at 32 by step, and 1.3 to 1.6 with prompts, of
which each side computes as many as it pads. With a cut generate sorts 49,152 numbers for each row, some 4 ms each:
above 2. Two streams: bound 0.65 by the products; attention over the hinted prompts costs more than over the plain ones,
the work once a step less, so 0.55 to 0.6 of one stream's tokens/s by step; less with prompts, as the hinted ones have
twice as many tokens and a response only 64. Natural ends: lengths of 60 to 256 leave generate's rows idle for a third
of the time, so 2 to 2.5 times.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import real_model
import torch
from real_model import Conversation

GENERATE_GOAL, TWO_STREAMS_GOAL = 1.5, 0.6
ROWS, TOKENS, ROUNDS = (8, 32), 64, 1
STREAM_ROUNDS = 3  # of pairs and rows in turn, by the engine
ENDED, ENDED_ROWS, ENDED_TOKENS = 64, 32, 256  # responses to their natural ends, at once, at most
CUT = {"temperature": 0.3, "top_p": 0.95}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "cut": CUT,
    "pairs": CUT,
}


class Decoded(NamedTuple):
    """Token ids of each response, when each step ended, and the seconds of the passes over prompts.

    cpu_stamps: the same as `stamps` in the process's processor time; only of the engine.
    """

    ids: list[np.ndarray]
    stamps: list[float]
    prompts_seconds: float
    cpu_stamps: Sequence[float] = ()


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
    ended, ended_rows, ended_tokens = (8, 4, 12) if smoke else (ENDED, ENDED_ROWS, ENDED_TOKENS)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = real_model.model_folder(options.hf_model, options.shape, scratch)
        scorer = real_model.load_scorer(folder, scratch, 2048)
        model = real_model.load_transformers(folder)
        vocab = model.config.vocab_size
        most = max(*all_rows, ended_rows)
        engine = DecodeEngine(scorer.model, vocab, max_positions=real_model.POSITIONS, max_rows=most)
        records = real_model.conversations(options, max(most, ended), vocab)
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

        def save(goals: Sequence[dict[str, Any]]) -> None:
            result["goals"] += goals
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "decoding.json").write_text(json.dumps(result, indent=1) + "\n")

        print(f"reading the weights takes {result['weights_read_ms']:.1f} ms", flush=True)
        for rows in all_rows:
            result["rows"][rows] = found = {"products": measure_products(products, rows)}
            for kind in KINDS:
                found[kind] = figures = measure(engine, model, records[:rows], kind, tokens, rounds)
                save(show(kind, rows, figures))
            found["streams"] = measure_streams(engine, records[:rows], tokens, rounds if smoke else STREAM_ROUNDS)
            save(compare_streams(rows, found))
        engine.max_rows = ended_rows
        stop_ids = find_stop_ids(options, model)
        result["natural_ends"] = figures = measure_ends(engine, model, records[:ended], stop_ids, ended_tokens)
        save(show_ends(figures))
    return 0


def measure_products(products: Any, rows: int) -> dict[str, Any]:
    """Milliseconds of a step's products alone, and the most that two streams can reach of one's tokens/s by them."""
    found: dict[str, Any] = {"torch_ms": {}, "packed_ms": {}}
    for count in (rows, 2 * rows):
        found["torch_ms"][count] = 1e3 * products.seconds(count, count)
        found["packed_ms"][count] = 1e3 * products.packed_seconds(count)
        print(
            f"{count} rows: a step's products alone take {found['torch_ms'][count]:.1f} ms by torch,"
            f" {found['packed_ms'][count]:.1f} with re-ordered copies",
            flush=True,
        )
    found["two_streams_bound"] = found["packed_ms"][rows] / found["packed_ms"][2 * rows]
    return found


def measure(
    engine: Any, model: Any, records: list[Conversation], kind: str, tokens: int, rounds: int
) -> dict[str, Any]:
    programs: dict[str, Callable[[int], Decoded]] = {
        "engine": lambda n: run_engine(engine, records, kind, n),
        "generate": lambda n: run_generate(model, records, kind, [n] * len(records)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    steps: dict[str, list[float]] = {name: [] for name in programs}
    prompts: dict[str, list[float]] = {name: [] for name in programs}
    last: dict[str, list[np.ndarray]] = {}
    for number in range(rounds + 1):
        for name, program in programs.items():
            decoded: list[Decoded] = []
            length = 3 if number == 0 else tokens  # the first allocates
            found = real_model.timed(lambda: decoded.append(program(length)))  # noqa: B023 - called at once
            if number > 0:
                times[name].append(found)
                steps[name] += np.diff(decoded[0].stamps).tolist()
                prompts[name].append(decoded[0].prompts_seconds)
                last[name] = decoded[0].ids
    step = {name: statistics.median(values) for name, values in steps.items()}
    whole = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    streams = 2 if kind == "pairs" else 1
    result = {
        "seconds": {name: [wall for wall, _ in values] for name, values in times.items()},
        "cpu_seconds": {name: [cpu for _, cpu in values] for name, values in times.items()},
        "prompts_seconds": prompts,
        "step_ms": {name: 1e3 * value for name, value in step.items()},
        "tokens_per_second": {name: len(records) * tokens / value for name, value in whole.items()},
        "row_tokens_per_second": {name: streams * len(records) * tokens / value for name, value in whole.items()},
        "responses_per_second": {name: len(records) / value for name, value in whole.items()},
        "times_generate_step": step["generate"] / step["engine"],
        "times_generate": statistics.median(
            b / a for (a, _), (b, _) in zip(times["engine"], times["generate"], strict=True)
        ),
    }
    if kind == "greedy":  # the same work: rounding decides between near equals, and then the rest differs
        pairs = zip(last["engine"], last["generate"], strict=True)
        result["equal_rows"] = sum(bool((a == b).all()) for a, b in pairs)
    return result


def measure_streams(engine: Any, records: list[Conversation], tokens: int, rounds: int) -> dict[str, list[float]]:
    """What pairs reach of one stream's tokens/s, round by round, each in turn: the machine's speed drifts."""
    found: dict[str, list[float]] = {"step": [], "step_cpu": [], "whole": [], "whole_cpu": []}
    for _ in range(rounds):
        steps, cpu_steps, whole = {}, {}, {}
        for kind in ("cut", "pairs"):
            decoded: list[Decoded] = []
            whole[kind] = real_model.timed(lambda: decoded.append(run_engine(engine, records, kind, tokens)))  # noqa: B023 - called at once
            steps[kind] = statistics.median(np.diff(decoded[0].stamps).tolist())
            cpu_steps[kind] = statistics.median(np.diff(decoded[0].cpu_stamps).tolist())
        found["step"].append(steps["cut"] / steps["pairs"])
        found["step_cpu"].append(cpu_steps["cut"] / cpu_steps["pairs"])
        found["whole"].append(whole["cut"][0] / whole["pairs"][0])
        found["whole_cpu"].append(whole["cut"][1] / whole["pairs"][1])
    return found


def show(kind: str, rows: int, figures: dict[str, Any]) -> list[dict[str, Any]]:
    for name, value in figures["step_ms"].items():
        print(
            f"  {kind:8}{name:10}{value:8.1f} ms a step; with prompts ({figures['prompts_seconds'][name][-1]:.2f} of"
            f" {figures['seconds'][name][-1]:.2f} s) {figures['tokens_per_second'][name]:,.0f} tokens/s,"
            f" {figures['row_tokens_per_second'][name]:,.0f} row tokens/s",
            flush=True,
        )
    if "equal_rows" in figures:
        print(f"  {figures['equal_rows']} of {rows} rows have the same tokens", flush=True)
    if kind == "pairs":  # generate does less work there
        return []
    return [real_model.goal(f"{kind}, {rows} rows, against generate", figures["times_generate"], GENERATE_GOAL)]


def compare_streams(rows: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens/s of pairs as a share of those of as many own responses."""
    name = f"{rows} pairs against one stream of {rows} rows"
    print(f"  {name}: at most {found['products']['two_streams_bound']:.2f} by the products alone", flush=True)
    share = {kind: statistics.median(values) for kind, values in found["streams"].items()}
    print(f"  by processor time {share['step_cpu']:.2f} by step, {share['whole_cpu']:.2f} with prompts", flush=True)
    return [
        real_model.goal(f"{name}, by step", share["step"], TWO_STREAMS_GOAL),
        real_model.goal(f"{name}, with prompts", share["whole"], TWO_STREAMS_GOAL),
    ]


def find_stop_ids(options: argparse.Namespace, model: Any) -> list[int]:
    if options.hf_model is None:  # random weights end nothing: one token in twelve does
        return list(range(0, model.config.vocab_size, 12))
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


def measure_ends(
    engine: Any, model: Any, records: list[Conversation], stop_ids: list[int], tokens: int
) -> dict[str, Any]:
    """The same requests at the same lengths by both, and as many pairs by the engine."""
    rows = engine.max_rows
    decoded: dict[str, list[Decoded]] = {"engine": [], "generate": [], "engine, pairs": []}
    times = {}
    times["engine"] = real_model.timed(
        lambda: decoded["engine"].append(run_engine(engine, records, "cut", tokens, stop_ids))
    )
    lengths = [len(ids) for ids in decoded["engine"][0].ids]

    def generate() -> None:
        for begin in range(0, len(records), rows):
            part = slice(begin, begin + rows)
            decoded["generate"].append(run_generate(model, records[part], "cut", lengths[part]))

    times["generate"] = real_model.timed(generate)
    times["engine, pairs"] = real_model.timed(
        lambda: decoded["engine, pairs"].append(run_engine(engine, records, "pairs", tokens, stop_ids))
    )
    assert [len(ids) for part in decoded["generate"] for ids in part.ids] == lengths
    found: dict[str, Any] = {"rows": rows, "most_tokens": tokens, "lengths": lengths}
    for name, (wall, cpu) in times.items():
        total = sum(len(ids) for part in decoded[name] for ids in part.ids)
        found[name] = {
            "seconds": wall,
            "cpu_seconds": cpu,
            "prompts_seconds": sum(part.prompts_seconds for part in decoded[name]),
            "tokens": total,
            "tokens_per_second": total / wall,
            "row_tokens_per_second": (2 if "pairs" in name else 1) * total / wall,
            "responses_per_second": len(records) / wall,
        }
    return found


def show_ends(found: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = found["lengths"]
    print(
        f"{len(lengths)} responses to their ends, {found['rows']} at once: {min(lengths)} to {max(lengths)} tokens,"
        f" {statistics.mean(lengths):.0f} on average",
        flush=True,
    )
    for name in ("engine", "generate", "engine, pairs"):
        row = found[name]
        print(
            f"  {name:15}{row['seconds']:8.1f} s, {row['prompts_seconds']:.1f} of it prompts:"
            f" {row['responses_per_second']:.2f} responses/s, {row['tokens_per_second']:,.0f} tokens/s,"
            f" {row['row_tokens_per_second']:,.0f} row tokens/s",
            flush=True,
        )
    engine, pairs = found["engine"], found["engine, pairs"]
    return [
        real_model.goal(
            "natural ends, against generate", found["generate"]["seconds"] / engine["seconds"], GENERATE_GOAL
        ),
        real_model.goal(
            "natural ends, pairs against one stream, tokens/s",
            pairs["tokens_per_second"] / engine["tokens_per_second"],
            TWO_STREAMS_GOAL,
        ),
    ]


def run_engine(
    engine: Any, records: list[Conversation], kind: str, tokens: int, stop_ids: Sequence[int] = ()
) -> Decoded:
    from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping

    paired = kind == "pairs"
    requests = [Request(str(i), each.prompt, each.hinted if paired else None) for i, each in enumerate(records)]
    sampling = Sampling(**KINDS[kind], cut_before_temperature=KINDS[kind] is CUT)
    settings = DecodeSettings(sampling, Stopping(stop_ids, tokens), Linear(engine.vocab_size))
    stamps: list[tuple[float, float]] = []
    found: dict[str, np.ndarray] = {}
    engine.forget_prompts()
    with (
        timed_prompts(engine.model, "hidden_states", lambda tokens, positions: tokens) as seconds,
        stamped(engine, stamps),
    ):
        for completion in engine.decode(requests, settings):
            found[completion.request.id] = completion.token_ids
    walls, cpus = zip(*stamps, strict=True)
    return Decoded([found[request.id] for request in requests], list(walls), sum(seconds), cpus)


@contextmanager
def stamped(engine: Any, stamps: list[tuple[float, float]]) -> Iterator[None]:
    """Collects when each step's values were known, on the clock and in processor time."""
    step = engine._step

    def timed(*arguments: Any) -> Any:
        values = step(*arguments)
        stamps.append((time.perf_counter(), time.process_time()))
        return values

    engine._step = timed
    try:
        yield
    finally:
        del engine._step


@contextmanager
def timed_prompts(module: Any, name: str, ids_of: Callable[..., torch.Tensor]) -> Iterator[list[float]]:
    """Collects the seconds of a method's calls with more than one token a row."""
    method, seconds = getattr(module, name), []

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = method(*arguments, **named)
        if ids_of(*arguments, **named).shape[1] > 1:
            seconds.append(time.perf_counter() - start)
        return result

    setattr(module, name, timed)
    try:
        yield seconds
    finally:
        delattr(module, name)


@torch.inference_mode()
def run_generate(model: Any, records: list[Conversation], kind: str, lengths: Sequence[int]) -> Decoded:
    """Each record's rows end after so many tokens, and go on being computed until the last one does."""
    from transformers import StoppingCriteria

    prompts = [each.prompt for each in records] + ([each.hinted for each in records] if kind == "pairs" else [])
    longest = max(map(len, prompts))
    ids, seen = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], seen[row, longest - len(prompt) :] = prompt, 1
    ends = torch.tensor([*lengths] * (len(prompts) // len(records)))
    stamps: list[float] = []

    class Ends(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return ids.shape[1] - longest >= ends

    drawn = {"do_sample": True, "top_k": 0, **KINDS[kind]} if KINDS[kind]["temperature"] else {"do_sample": False}
    with timed_prompts(model, "forward", lambda input_ids=None, **_: input_ids) as seconds:
        out = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(seen),
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[Ends()],
            **drawn,
        )
    assert out.shape == (len(prompts), longest + max(lengths))
    rows = zip(out[:, longest:].numpy(), lengths, strict=False)
    return Decoded([tokens[:length] for tokens, length in rows], stamps, sum(seconds))

"""Tokens per second of Hinted Decoding against the number of pairs, beside slower ways and the machine's own limits.

    torchrun --standalone --nproc-per-node 1 tools/benchmarks/decoding.py --out RESULTS [--shape tiny|7b] [--pairs 64 1]
        [--shape smollm2 --hf-model DIR --records-file FILE [--rows 8 32]]

With `--shape smollm2` a real model is measured row for row beside `transformers.generate`: real_decoding.py says how.
All that follows is of the other shapes.

Random weights, prompts of one length each for the hinted and the plain stream, no stop tokens: all work is known
beforehand. The output layer is scaled so that the mean entropy is 1 nat, as of a trained model: top-p over nearly
uniform distributions is another problem. In one process, on one device:

    engine N pairs         DecodeEngine, N pairs at once: two rows of the batch each, mixed by the paper's linear form
    engine 1 pair          (a) the same loop, one record at a time
    engine N rows          one stream: as many responses as N pairs, of the plain prompts alone, drawn in the same way
    no cache               (b) both streams anew for every token, one record at a time, as the authors' demo does
    transformers.generate  (c) plain generation of 2 N rows with its cache; it neither mixes nor knows two prompts
    …, plain prompts       generate with the very prompts and the number of rows of `engine N rows`
    …, cuDNN allowed       the engine with cuDNN's attention among torch's choices: most pairs of the list
    prefills               of 20 shapes, each for the first and for the second time, with cuDNN and without

One after the other, in the order of --pairs, but for what is compared with one stream, which takes turns, as the speed
of a shared machine drifts; each is printed and written to RESULTS/decoding.json when it is done, and one that fails
(out of memory) is recorded and passed over. For the 7b shape (c) has 8 rows: its logits of whole prompts
in fp32 fill a GPU with more. Tokens are those of responses; row tokens count both rows of a pair.

(b) and (c) are a transformers Qwen2 of the same shape. The time of a step is that of long responses less that of short
ones, over the difference of their lengths, so that prefills do not count in it; tokens per second of whole responses
count them. The floor of a step is what it cannot do without, at the bandwidth and the matrix products per second that
the same device reaches in the same run: reading the weights once and the keys and values of all rows, or multiplying.

Expected before the first run. CPU, tiny, 32 pairs: at least 50 times (b), the goal: batching gives about 10 on one
thread (small products grow efficient), the cache about the length of the prompts in tokens less what attention costs,
about 20. (a) lies between, at about a tenth of the batch. H200, 7b, 64 pairs: at least 50 % of the floor, the other
goal; with SDPA over masked slots attention reads no more than the floor assumes, so that launches, not captured, are
the risk. On a CPU the floor is printed, but caches hold the tiny model's weights, so that it says little.

Expected before the first run of one stream: 32 pairs beside 32 rows, at least 0.6 of the tokens/s, the goal on every
shape. The public two-stream decoders reach 0.03 to 0.06 of their own single stream. H200, 7b: the weights are read
once for both streams; 32 pairs with the prompts below read 4.7 GB of keys and values more than 32 plain rows, so the
bound is 3.4 ms over 4.5, 0.75. CPU, tiny: products of 64 rows take 1.6 times those of 32 and attention reads 4 times as
much, against work that is done once a step: 0.55 to 0.65. One stream beside generate on the CPU, goal 1.5: the model
is so small that operations from Python decide, of which the engine has a third: 2 times.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

import real_decoding
import real_model
from real_decoding import Linear

SPEEDUP_GOAL, SPEEDUP_PAIRS = 50.0, 32
FLOOR_GOAL, FLOOR_PAIRS = 0.5, 64
TWO_STREAMS_GOAL, GENERATE_GOAL = 0.6, 1.5

# hidden, ffn, layers, heads, key-value heads, vocabulary; tokens: hinted and plain prompts, short and long responses
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": (256, 768, 4, 8, 4, 8192),
        "prompts": (256, 48),
        "responses": (16, 144),
        "uncached": 48,
        "pairs": (1, 2, 4, 8, 16, 32),
        "one_stream": 32,
        "generate_rows": 64,
        "rounds": 5,
    },
    # Qwen2.5-7B
    "7b": {
        "model": (3584, 18944, 28, 28, 4, 152064),
        "prompts": (2500, 120),
        "responses": (16, 144),
        "uncached": 12,
        "pairs": (64, 32, 1, 8, 96),
        "one_stream": 32,
        "generate_rows": 8,
        "rounds": 1,
    },
    "smoke": {
        "model": (64, 96, 2, 4, 2, 256),
        "prompts": (24, 6),
        "responses": (4, 12),
        "uncached": 6,
        "pairs": (4, 1),
        "one_stream": 4,
        "generate_rows": 4,
        "rounds": 1,
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of decoding.json")
    shapes = (*SHAPES, "smollm2", "smollm2-smoke")
    parser.add_argument("--shape", choices=shapes, default=None, help="default: 7b on a GPU, tiny elsewhere")
    real_model.add_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=None, help="of smollm2")
    parser.add_argument("--pairs", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=None)
    return parser.parse_args()


def build_megatron(shape: dict[str, Any], on_gpu: bool) -> Any:
    """A randomly initialised GPTModel, by Megatron's own parser and builder."""
    hidden, ffn, layers, heads, groups, vocab = shape["model"]
    positions = max(shape["prompts"]) + max(shape["responses"])
    flags = f"""
        --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads {heads}
        --group-query-attention --num-query-groups {groups} --seq-length {positions}
        --max-position-embeddings {positions} --position-embedding-type rope
        --normalization RMSNorm --swiglu --disable-bias-linear --add-qkv-bias
        --untie-embeddings-and-output-weights --micro-batch-size 1 --tokenizer-type NullTokenizer
        --vocab-size {vocab} --make-vocab-size-divisible-by 1 --attention-dropout 0 --hidden-dropout 0
    """
    if on_gpu:
        flags += "--bf16 --transformer-impl local --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
    from megatron_idft.integration.platform.start import prepare_process

    prepare_process("decoding benchmark", flags.split(), force_cpu=not on_gpu)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    config = gpt_config_from_args(parse_and_validate_args())
    initialize_megatron()
    groups_ = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_distributed_models(pg_collection=groups_, wrap_with_ddp=False)


def build_transformers(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, ffn, layers, heads, groups, vocab = shape["model"]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=max(shape["prompts"]) + max(shape["responses"]),
        tie_word_embeddings=False,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Ceiling:
    """What this device reaches now: bytes per second of a read, matrix products per second."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size, side = (2**31, 8192) if device.type == "cuda" else (2**27, 1024)
        buffer = torch.ones(size // 4, device=device)
        self.bytes_per_second = size / self._best(lambda: buffer.sum(), device)
        a = torch.randn(side, side, device=device, dtype=dtype)
        self.flops_per_second = 2 * side**3 / self._best(lambda: a @ a, device)

    @staticmethod
    def _best(call: Callable[[], object], device: torch.device) -> float:
        times = []
        for _ in range(8):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    def floor_seconds(self, shape: dict[str, Any], responses: int, prompts: Sequence[int], itemsize: int) -> float:
        """Of one step halfway through the long response, of which each has a row for every one of `prompts`."""
        hidden, ffn, layers, heads, groups, vocab = shape["model"]
        kv_width = hidden // heads * groups
        weights = layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * ffn) + hidden * vocab
        positions = sum(prompt + sum(shape["responses"]) // 2 for prompt in prompts)
        cache = responses * positions * 2 * layers * kv_width
        read = (weights + cache) * itemsize / self.bytes_per_second
        return max(read, 2 * len(prompts) * responses * weights / self.flops_per_second)


@torch.no_grad()
def sharpen(weight: torch.Tensor, logits: torch.Tensor) -> None:
    """Scale the output layer that made `logits` [n, V] until their mean entropy is 1 nat."""
    low, high = 1.0, 1e4
    for _ in range(40):
        scale = (low * high) ** 0.5
        log_probs = (logits.float() * scale).log_softmax(-1)
        low, high = (scale, high) if -(log_probs.exp() * log_probs).sum(-1).mean() > 1 else (low, scale)
    weight.mul_(scale)


class Programs:
    """Each decodes responses of a number of tokens, and ends when they are on the host."""

    def __init__(self, shape: dict[str, Any], on_gpu: bool, max_pairs: int) -> None:
        from megatron_idft.inference.attention import Prefill
        from megatron_idft.inference.engine import DecodeEngine

        self.shape, self.vocab = shape, shape["model"][-1]
        positions = max(shape["prompts"]) + max(shape["responses"])
        megatron = build_megatron(shape, on_gpu)
        self.engine = DecodeEngine(megatron, self.vocab, max_positions=positions, max_rows=max_pairs)
        self.device, self.dtype = self.engine.model.device, self.engine.model.dtype
        self.transformers = build_transformers(shape, self.device, self.dtype)
        rng = np.random.default_rng(0)
        hinted, plain = shape["prompts"]
        with torch.no_grad():
            ids = torch.from_numpy(rng.integers(0, self.vocab, (1, min(64, positions)))).to(self.device)
            sharpen(self.transformers.lm_head.weight, self.transformers(ids).logits[0])
            served = self.engine.model
            positions_of = torch.arange(ids.shape[1], device=self.device)[None]
            with self.engine.cache.prefilling(Prefill()):
                logits = served.logits(served.hidden_states(ids, positions_of))[:, 0]
            sharpen(served.language_model.output_layer.weight, logits[:, : self.vocab])
        self.prompts = [
            (rng.integers(0, self.vocab, hinted), rng.integers(0, self.vocab, plain)) for _ in range(max_pairs)
        ]

    def run_engine(self, responses: int, tokens: int, paired: bool = True) -> None:
        from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping

        requests = [
            Request(str(i), plain, hinted if paired else None)
            for i, (hinted, plain) in enumerate(self.prompts[:responses])
        ]
        sampling = Sampling(0.3, top_p=0.95, cut_before_temperature=True)
        settings = DecodeSettings(sampling, Stopping((), tokens), Linear(self.vocab))
        self.engine.forget_prompts()
        lengths = [len(completion.token_ids) for completion in self.engine.decode(requests, settings)]
        assert lengths == [tokens] * responses

    @torch.no_grad()
    def run_prefill(self, rows: int, length: int) -> None:
        from megatron_idft.inference.attention import Prefill

        engine, tokens = self.engine, torch.ones(rows, length, dtype=torch.int64, device=self.device)
        positions = torch.arange(length, device=self.device).expand(rows, length)
        with engine.cache.prefilling(Prefill()):
            engine.model.hidden_states(tokens, positions)

    @torch.no_grad()
    def run_without_cache(self, tokens: int) -> None:
        ids = [torch.from_numpy(prompt)[None].to(self.device) for prompt in self.prompts[0]]
        mixing = Linear(self.vocab)
        for _ in range(tokens):
            hinted, plain = (
                self.transformers(stream, use_cache=False).logits[0, -1].float().log_softmax(-1) for stream in ids
            )
            plain_share = mixing.plain_share(-(hinted.exp() * hinted).sum())
            mixed = torch.lerp(hinted, plain, plain_share)
            falling, order = mixed.softmax(-1).sort(descending=True)
            kept = order[(falling.cumsum(-1) - falling) < 0.95]
            token = kept[torch.multinomial((mixed[kept] / 0.3).softmax(-1), 1)]
            ids = [torch.cat([stream, token[None]], -1) for stream in ids]
        ids[0].tolist()

    def run_generate(self, pairs: int, tokens: int) -> None:
        """Rows of the hinted length: transformers pads the shorter ones to it."""
        hinted = np.stack([hinted for hinted, _ in self.prompts[:pairs]])
        self.generate(np.concatenate([hinted, hinted[::-1]]), tokens)

    def run_generate_plain(self, rows: int, tokens: int) -> None:
        self.generate(np.stack([plain for _, plain in self.prompts[:rows]]), tokens)

    @torch.no_grad()
    def generate(self, prompts: np.ndarray, tokens: int) -> None:
        ids = torch.from_numpy(prompts).to(self.device)
        out = self.transformers.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.3,
            top_p=0.95,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape[1] == ids.shape[1] + tokens


def seconds(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class Variant(NamedTuple):
    """run: decodes so many tokens. lengths: of short and long responses. responses: decoded at once.

    prompts: lengths of a response's streams.
    """

    run: Callable[[int], None]
    lengths: tuple[int, int]
    responses: int
    prompts: tuple[int, ...]
    cudnn: bool = False


def variants(programs: Programs, shape: dict[str, Any], all_pairs: Sequence[int]) -> list[dict[str, Variant]]:
    """In the order in which they are measured; those of one group in turn."""
    lengths, uncached, most = shape["responses"], shape["uncached"], max(all_pairs)
    single, prompts = shape["one_stream"], shape["prompts"]
    found: list[dict[str, Variant]] = []
    for pairs in all_pairs:
        variant = Variant(lambda n, p=pairs: programs.run_engine(p, n), lengths, pairs, prompts)
        found.append({f"engine {pairs} pairs": variant})
        if pairs == single:
            found[-1][f"engine {single} rows"] = Variant(
                lambda n: programs.run_engine(single, n, paired=False), lengths, single, prompts[1:]
            )
            found[-1][f"transformers.generate {single} rows, plain prompts"] = Variant(
                lambda n: programs.run_generate_plain(single, n), lengths, single, prompts[1:]
            )
        if pairs == most:
            found.append({f"engine {pairs} pairs, cuDNN allowed": variant._replace(cudnn=True)})
    found.append({"no cache": Variant(programs.run_without_cache, (uncached // 2, uncached), 1, prompts)})
    rows = min(2 * most, shape["generate_rows"])
    generate = Variant(lambda n: programs.run_generate(rows // 2, n), lengths, rows, prompts[:1])
    return [*found, {f"transformers.generate {rows} rows": generate}]


def measure(
    group: dict[str, Variant], programs: Programs, rounds: int, failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Times of short and long responses, in turn, and what follows from them for each."""
    times: dict[str, list[list[float]]] = {title: [] for title in group}
    programs.engine._forward.close()  # graphs hold the attention that they were captured with
    for _ in range(rounds + 1):
        for title, variant in group.items():
            if title not in failed:
                with failures(title, failed):
                    times[title].append(times_of(variant, programs))
    # The first compiles, captures and allocates.
    return {title: figures(group[title], times[title][1:], programs) for title in group if title not in failed}


def times_of(variant: Variant, programs: Programs) -> list[float]:
    cache = programs.engine.cache
    cache.cudnn = variant.cudnn
    try:
        return [seconds(lambda n=n: variant.run(n), programs.device) for n in variant.lengths]
    finally:
        cache.cudnn = False


def figures(variant: Variant, times: list[list[float]], programs: Programs) -> dict[str, Any]:
    short, long = variant.lengths
    step = statistics.median((b - a) / (long - short) for a, b in times)
    whole = statistics.median(b for _, b in times)
    return {
        "responses": variant.responses,
        "seconds": times,
        "step_ms": 1e3 * step,
        "tokens_per_second_decoding": variant.responses / step,
        "tokens_per_second_whole": variant.responses * long / whole,
        "row_tokens_per_second_decoding": variant.responses * len(variant.prompts) / step,
        "row_tokens_per_second_whole": variant.responses * len(variant.prompts) * long / whole,
        "prompts_seconds": statistics.median(a for a, _ in times) - short * step,
        "graphs": len(programs.engine._forward._captured),
        "graphs_gib": pool_bytes(programs.engine) / 2**30,
    }


def pool_bytes(engine: Any) -> int:
    """What the pool of the captured graphs holds of the device's memory."""
    pool = engine._forward._pool
    if pool is None:
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(part["total_size"] for part in segments if tuple(part.get("segment_pool_id", ())) == tuple(pool))


def measure_prefills(programs: Programs, shape: dict[str, Any], cudnn: bool) -> dict[str, Any]:
    """Of 20 shapes, for the first and for the second time."""
    rng = np.random.default_rng(1 + cudnn)  # other shapes: kernels of the first way stay warm
    longest = max(shape["prompts"])
    shapes = [(int(rng.integers(1, 5)), int(rng.integers(longest // 4, longest + 1))) for _ in range(20)]
    cache, device = programs.engine.cache, programs.device
    cache.cudnn = cudnn
    programs.run_prefill(1, longest)  # what is compiled and allocated once, whatever the shape
    first, second = (
        [seconds(lambda each=each: programs.run_prefill(*each), device) for each in shapes] for _ in range(2)
    )
    cache.cudnn = False
    return {
        "shapes": shapes,
        "first_seconds": first,
        "second_seconds": second,
        "ms_more_for_a_new_shape": 1e3 * statistics.median(a - b for a, b in zip(first, second, strict=True)),
    }


def print_variant(name: str, row: dict[str, Any]) -> None:
    floor = f"{row['floor_ms']:9.2f} ms floor, {row['share_of_floor']:5.0%} of it" if "floor_ms" in row else ""
    graphs = f"; {row['graphs']} graphs, {row['graphs_gib']:.2f} GiB" if row["graphs"] else ""
    print(
        f"{name:40}{row['step_ms']:9.2f} ms a step {row['tokens_per_second_decoding']:9,.0f} tokens/s"
        f" ({row['row_tokens_per_second_decoding']:,.0f} row tokens/s) decoding"
        f" {row['tokens_per_second_whole']:9,.0f} with prompts {floor}{graphs}",
        flush=True,
    )


def main() -> int:
    args = parse_arguments()
    if (args.shape or "").startswith("smollm2"):
        return real_decoding.main(args)
    on_gpu = torch.cuda.is_available()
    name = args.shape or ("7b" if on_gpu else "tiny")
    shape = SHAPES[name]
    all_pairs = tuple(args.pairs or shape["pairs"])
    rounds = args.rounds or shape["rounds"]
    sys.argv = sys.argv[:1]
    programs = Programs(shape, on_gpu, max(all_pairs))
    device = programs.device
    print(programs.engine.describe(), flush=True)
    ceiling = Ceiling(device, programs.dtype)
    print(
        f"ceiling: {ceiling.bytes_per_second / 1e9:,.0f} GB/s read, {ceiling.flops_per_second / 1e12:,.2f} TFLOP/s"
        f" {str(programs.dtype).removeprefix('torch.')}",
        flush=True,
    )
    rows: dict[str, dict[str, Any]] = {}
    prefills: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    result = {
        "benchmark": "decoding",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "shape": name,
        **{key: value for key, value in shape.items() if key != "rounds"},
        "rounds": rounds,
        "engine": programs.engine.describe(),
        "bytes_per_second": ceiling.bytes_per_second,
        "flops_per_second": ceiling.flops_per_second,
        "variants": rows,
        "prefills": prefills,
        "failed": failed,
    }
    itemsize = torch.empty((), dtype=programs.dtype).element_size()
    planned = variants(programs, shape, all_pairs)
    for number, group in enumerate(planned):
        if number == 1:  # behind what matters most
            for label, cudnn in (("without cuDNN", False), ("cuDNN allowed", True)):
                with failures(f"prefills, {label}", failed):
                    prefills[label] = found = measure_prefills(programs, shape, cudnn)
                    more = found["ms_more_for_a_new_shape"]
                    print(f"{f'prefills, {label}':36}{more:9.2f} ms more for a new shape", flush=True)
        for title, row in measure(group, programs, rounds, failed).items():
            if title.startswith("engine"):
                variant = group[title]
                row["floor_ms"] = 1e3 * ceiling.floor_seconds(shape, variant.responses, variant.prompts, itemsize)
                row["share_of_floor"] = row["floor_ms"] / row["step_ms"]
            rows[title] = row
            print_variant(title, row)
        save(result | {"goals": judge(rows, on_gpu, name)}, args.out)  # in case that this is stopped
    for goal in judge(rows, on_gpu, name):
        print(f"{'hit ' if goal['hit'] else 'MISS'}  {goal['name']}: {goal['value']:.2f} (goal {goal['goal']:g})")
    return 1 if failed else 0


@contextlib.contextmanager
def failures(title: str, failed: dict[str, str]) -> Iterator[None]:
    """What fails in here, of memory for example, is printed and recorded."""
    try:
        yield
    except RuntimeError as error:
        failed[title] = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"{title:36}FAILED: {failed[title]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def save(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decoding.json").write_text(json.dumps(result, indent=1) + "\n")


def judge(rows: dict[str, dict[str, Any]], on_gpu: bool, shape: str) -> list[dict[str, Any]]:
    """Ratios, each with its goal where this machine and shape have one."""
    goals = []

    def compare(name: str, over: str, under: str, goal: float, rate: str = "tokens_per_second_whole") -> None:
        if {over, under} <= rows.keys():
            goals.append({"name": name, "value": rows[over][rate] / rows[under][rate], "goal": goal})

    single = SHAPES[shape]["one_stream"]
    pairs, plain = f"engine {single} pairs", f"engine {single} rows"
    if shape == "tiny":
        compare(f"{SPEEDUP_PAIRS} pairs against no cache", f"engine {SPEEDUP_PAIRS} pairs", "no cache", SPEEDUP_GOAL)
    for rate, meaning in (("decoding", "decoding"), ("whole", "with prompts")):
        name = f"{single} pairs against one stream of {single} rows, {meaning}"
        compare(name, pairs, plain, TWO_STREAMS_GOAL, f"tokens_per_second_{rate}")
    compare(
        f"one stream of {single} rows against generate",
        plain,
        f"transformers.generate {single} rows, plain prompts",
        GENERATE_GOAL,
    )
    if on_gpu and shape == "7b" and f"engine {FLOOR_PAIRS} pairs" in rows:
        value = rows[f"engine {FLOOR_PAIRS} pairs"]["share_of_floor"]
        goals.append({"name": f"{FLOOR_PAIRS} pairs, share of the floor", "value": value, "goal": FLOOR_GOAL})
    return [goal | {"hit": goal["value"] >= goal["goal"]} for goal in goals]


if __name__ == "__main__":
    sys.exit(main())

"""Trained tokens per second of the real trainer on the CPU: the same records padded one by one, and as packs.

    python tools/benchmarks/packed_training.py --json RESULTS.json [--smoke]

Conversations with a long tail of lengths, a prompt and an answer each, once as `train` reads records (every record is a
sequence, padded to the sequence length), once as `prepare` packs them. Model, micro-batch and loss are the same, one
process and one thread. Every run visits each record once. The variants take turns; of each run the first iterations are
left out; trained tokens and Megatron's own time per iteration of the others count. Printed are minimum, median and
maximum over the runs.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from toy_tokenizer import train_tokenizer

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare

CHECKOUT = Path(__file__).resolve().parents[2]
EXPECTATION = (
    "Megatron's local attention computes all s x s scores of a sequence and then masks, whether it holds one padded "
    "record or a pack, and every other layer works on padding as on text. So a step costs the same either way, and "
    "trained tokens per second grow as the share of positions that are not padding: a pack's over a padded record's, "
    "which is the ceiling. Packs build a mask of s x s for each sequence: 0.9 to 1.0 of the ceiling. With Transformer "
    "Engine on a GPU, which computes no scores across documents, packs would gain more than this ceiling."
)
MIN_SHARE_OF_CEILING = 0.9
WARM_UP = 3
# Megatron's line and ours behind it.
ITERATION = re.compile(r"(?s)iteration +\d+/.*?elapsed time per iteration \(ms\): ([\d.]+).*?trained tokens: (\d+)")
# No DataLoader workers: they would take the cores that are measured.
COMMON = """
    --num-attention-heads 4 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --lr-decay-style constant --num-workers 0 --log-interval 1
    --train-epochs 1 --chat-template chatml --sft-loss idft --seed 1 --cpu
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=320)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, whose figures mean nothing")
    args = parser.parse_args()
    if args.smoke:
        args.records, args.seq_length, args.layers, args.hidden, args.rounds = 28, 64, 1, 32, 1
    return args


def make_data(folder: Path, records: int, seq_length: int) -> dict[str, Any]:
    """records.jsonl, a tokenizer and packs; what part of either's positions holds text."""
    chance = random.Random(1)
    lines = []
    for _ in range(records):
        length = int(min(seq_length + 1, max(8, chance.lognormvariate(0, 0.9) * seq_length / 7)))
        prompt = max(1, length // 4)
        ids = [chance.randrange(8, 56) for _ in range(length)]
        row = {"prompt": "1?", "response": "2", "token_ids": ids, "loss_mask": [0] * prompt + [1] * (length - prompt)}
        lines.append(json.dumps(row))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model", chat_template="chatml")
    settings = PrepareSettings((str(folder / "records.jsonl"),), seq_length)
    store = prepare(settings, tokenizer, folder / "packs", workers=1, progress=False).store
    positions = store.meta["tokens"] - store.meta["documents"]  # a document's last token is only a label
    return {
        "records": store.meta["documents"],
        "packs": len(store),
        "trained_tokens": store.meta["counts"]["trained_tokens"],
        "share_of_text": {
            "padded": positions / (store.meta["documents"] * seq_length),
            "packed": positions / (len(store) * seq_length),
        },
    }


def train(folder: Path, data: str, args: argparse.Namespace) -> dict[str, float]:
    """One epoch; trained tokens per second and milliseconds per iteration behind the warm-up."""
    length, batch = args.seq_length, args.micro_batch_size
    words = f"{COMMON} --sft-data {folder / data} --tokenizer-model {folder / 'tokenizer.model'}"
    words += f" --num-layers {args.layers} --hidden-size {args.hidden} --seq-length {length}"
    words += f" --max-position-embeddings {length} --micro-batch-size {batch} --global-batch-size {batch}"
    environment = {
        **os.environ,
        **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "megatron_idft", "train", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    steps = [(float(ms), float(tokens)) for ms, tokens in ITERATION.findall(done.stdout)]
    if done.returncode or len(steps) <= WARM_UP:
        raise RuntimeError(f"{' '.join(command)}\n{len(steps)} iterations\n{(done.stdout + done.stderr)[-3000:]}")
    counted = steps[WARM_UP:]
    milliseconds = sum(ms for ms, _ in counted)
    return {
        "iterations": len(steps),
        "trained_tokens": sum(tokens for _, tokens in steps),
        "tokens_per_second": 1e3 * sum(tokens for _, tokens in counted) / milliseconds,
        "median_step_ms": statistics.median(ms for ms, _ in counted),
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def surroundings() -> dict[str, Any]:
    """Hardware, versions and the state of the checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model.group(1) if model else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": 1,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def main() -> None:
    args = parse_arguments()
    result: dict[str, Any] = {"benchmark": "packed_training", **surroundings(), "expectation": EXPECTATION}
    runs: dict[str, list[dict[str, float]]] = {"padded": [], "packed": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_data(folder, args.records, args.seq_length)
        for _ in range(args.rounds):
            for name, path in (("padded", "records.jsonl"), ("packed", "packs")):
                runs[name].append(train(folder, path, args))
                assert runs[name][-1]["trained_tokens"] == data["trained_tokens"], (runs[name][-1], data)
    rates = {name: summary([run["tokens_per_second"] for run in runs[name]]) for name in runs}
    shares = data["share_of_text"]
    ceiling = shares["packed"] / shares["padded"]
    speed_up = rates["packed"]["median"] / rates["padded"]["median"]
    hit = speed_up >= MIN_SHARE_OF_CEILING * ceiling
    for name, rate in rates.items():
        print(
            f"{name}: {rate['median']:9,.0f} trained tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f}),"
            f" {shares[name]:.3f} of all positions hold text"
        )
    print(
        f"{'hit' if hit else 'MISS'}: packs are {speed_up:.2f} times as fast, {speed_up / ceiling:.3f} of the ceiling"
        f" {ceiling:.2f} (goal {MIN_SHARE_OF_CEILING})"
    )
    if args.json:
        result |= {
            "settings": {name: value for name, value in vars(args).items() if name != "json"} | {"warm_up": WARM_UP},
            "data": data,
            "runs": runs,
            "trained_tokens_per_second": rates,
            "step_ms": {name: summary([run["median_step_ms"] for run in runs[name]]) for name in runs},
            "speed_up": speed_up,
            "ceiling": ceiling,
            "share_of_ceiling": speed_up / ceiling,
            "goal_hit": hit,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

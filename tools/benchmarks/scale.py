"""What one rank does at 1 to 1024 ranks, by counting: bytes, collectives and memory of the loss, the metrics, the data.

    python tools/benchmarks/scale.py --out RESULTS [--ranks 1 8 16 64 256 1024]

For each number of ranks, one process plays rank 0 of the real trainer over packs: Megatron's fake process group sets up
all groups at their real sizes, and each collective returns at once with what this rank put in. So values mean nothing
above one rank, and nothing is timed. What is counted is exact: every collective that torch dispatches, with its group's
size and its tensor's bytes; the bytes of every tensor that this package's code allocates in a step; the samples that
the rank reads; its operations on the rendezvous store. A collective belongs to whom the innermost frame outside torch
belongs to: this package or Megatron.

Assumptions, also in the results: tensor parallelism of min(8, ranks), the rest data parallelism with the distributed
optimizer; two micro-batches of one pack per rank and step whatever the number of ranks; a report every step; an
evaluation of as many packs as there are data-parallel ranks. Bytes sent are those of a ring: (n - 1)/n of the tensor
for an all-gather or a reduce-scatter, twice that for an all-reduce. Times are not known from counts, least of all the
latency of a collective over many ranks.

Expected before the first run: from 8 ranks on (tensor parallelism is full) every line of this package is flat. The loss
sends 16 bytes per token and micro-batch in one all-gather over the tensor-parallel group; metrics one all-reduce of
less than 2 KiB per report; data reads two packs a step. Megatron's own lines: gradients and parameters flat in bytes,
the gathers of checkpoints and timers with the number of ranks. More bytes, collectives or allocations of this package
at 1024 ranks than at 8: MISS, and exit code 1.

Written to RESULTS: scale.json and scale.png.
"""

import argparse
import functools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toy_tokenizer import train_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
SEQ_LENGTH, STEPS = 128, 3
# No DataLoader workers: what a rank does is counted in its own process.
FLAGS = f"""
    --cpu --fake-process-group --use-distributed-optimizer --num-layers 2 --hidden-size 64 --num-attention-heads 8
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --position-embedding-type rope --micro-batch-size 1
    --lr 1e-3 --lr-decay-style constant --num-workers 0 --log-interval 1 --chat-template chatml --train-iters {STEPS}
    --make-vocab-size-divisible-by 128 --sft-loss idft --eval-interval {STEPS} --eval-iters 1 --start-eval-at-iter 1
    --no-check-for-nan-in-loss-and-grad --clip-grad 0 --seed 1
"""
PARTS = {
    "loss": "loss",
    "integration/loss/metrics": "metrics",
    "data": "data",
    "integration/training/batches": "data",
    # What Megatron leaves to CUDA and Transformer Engine, and what this machine needs in their place.
    "integration/platform/cpu": "CPU mode",
    "integration/platform/local_layers": "CPU mode",
}
RANKS = (1, 8, 16, 64, 256, 1024)


def make_data(folder: Path) -> None:
    """Packs of two sources, and a tokenizer for them."""
    from megatron_idft.data.chat.tokenizer import load_tokenizer
    from megatron_idft.data.packed.pack_settings import PrepareSettings
    from megatron_idft.data.packed.prepare import prepare

    train_tokenizer(folder)
    chance = random.Random(1)
    lines = []
    for number in range(4000):
        a, b = chance.randrange(100), chance.randrange(100)
        record = {"prompt": f"{a} + {b}", "response": f"{a} + {b} = {a + b}. " * (1 + number % 3)}
        lines.append(json.dumps(record | {"source": ("short", "long")[number % 2]}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = load_tokenizer(str(folder / "tokenizer.model"), chat_template="chatml")
    settings = PrepareSettings(paths=(str(folder / "train.jsonl"),), seq_length=SEQ_LENGTH)
    prepare(settings, tokenizer, folder / "packs", workers=2, progress=False)


# ----------------------------------------------------------------------------------------------------- one rank's count


def owner() -> tuple[str, str]:
    """(who, which part) is at work: of the innermost frame that is this package's or Megatron's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/megatron_idft/" in file:
            module = file.rsplit("/megatron_idft/", 1)[1]
            return "this package", next((part for path, part in PARTS.items() if module.startswith(path)), "other")
        if "/megatron/" in file:
            return "Megatron", "Megatron"
        frame = frame.f_back
    return "torch", "torch"


def ring_bytes(name: str, size: int, numbers: int) -> float:
    """Bytes that a rank sends over a ring of `size` ranks. numbers: bytes of the whole tensor."""
    rounds = 2 if "allreduce" in name else 1
    return rounds * (size - 1) / size * numbers


def count_rank(folder: Path, ranks: int, out: Path) -> None:
    """Play rank 0 of `ranks`; write what was counted to `out`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    collectives: Counter[tuple[Any, ...]] = Counter()
    allocated: Counter[tuple[str, str]] = Counter()
    phase = ["start"]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = str(function)
            if name.startswith("c10d."):
                self.collective(name, args)
            elif isinstance(result, torch.Tensor) and result._base is None and not name.endswith("_.default"):
                who, part = owner()
                if who == "this package":
                    allocated[phase[0], part] += result.untyped_storage().nbytes()
            return result

        def collective(self, name: str, args: Any) -> None:
            leaves = torch.utils._pytree.tree_leaves(args)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            group = torch.distributed.ProcessGroup.unbox(next(x for x in leaves if isinstance(x, torch.ScriptObject)))
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else 0
            if len(tensors) > 2:  # a list of slots, one for each rank
                whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors[: group.size()])
            collectives[phase[0], *owner(), name.split(".")[1].strip("_"), group.size(), whole] += 1

    from megatron_idft.integration.platform import cpu

    cpu.enable()
    from megatron.training import training

    from megatron_idft.data.packed.dataset import PackedDataset

    read: Counter[tuple[str, str]] = Counter()
    honest_item, honest_step = PackedDataset.__getitem__, training.train_step

    def item(self: PackedDataset, index: int) -> Any:
        sample = honest_item(self, index)
        read[phase[0], "samples"] += 1
        read[phase[0], "bytes of samples"] += sum(tensor.nbytes for tensor in sample.values())
        return sample

    @functools.wraps(honest_step)  # its signature is what the integration binds arguments by
    def step(*args: Any, **kwargs: Any) -> Any:
        # Gradients, metrics and the report of the step before last are those of the steady state.
        phase[0] = f"step {kwargs.get('iteration', args[7] if len(args) > 7 else 0)}"
        return honest_step(*args, **kwargs)

    PackedDataset.__getitem__ = item  # type: ignore[method-assign]
    training.train_step = step
    honest_evaluate = training.evaluate_and_print_results

    @functools.wraps(honest_evaluate)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        phase[0] = "evaluation"
        return honest_evaluate(*args, **kwargs)

    training.evaluate_and_print_results = evaluate
    tensor_parallel = min(8, ranks)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(8, ranks))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "GROUP_RANK": "0"}
    data_parallel = ranks // tensor_parallel
    words = f"{FLAGS} --tensor-model-parallel-size {tensor_parallel} --global-batch-size {2 * data_parallel}"
    words += f" --sft-data {folder / 'packs'} --sft-valid-data {folder / 'packs'} --tokenizer-model"
    words += f" {folder / 'tokenizer.model'} --eval-global-batch-size {data_parallel}"
    if tensor_parallel > 1:
        words += " --sequence-parallel"
    sys.argv = ["train", *words.split()]
    from megatron_idft.cli.train import main

    with Counting():
        code = main(sys.argv[1:])
    steady = f"step {STEPS - 1}"
    rows = [
        dict(zip(("phase", "who", "part", "collective", "group", "bytes", "calls"), (*key, n), strict=True))
        for key, n in sorted(collectives.items(), key=str)
    ]
    for row in rows:
        row["sent"] = row["calls"] * ring_bytes(row["collective"], row["group"], row["bytes"])
    result = {
        "ranks": ranks,
        "tensor_parallel": tensor_parallel,
        "data_parallel": data_parallel,
        "steady_phase": steady,
        "collectives": rows,
        "allocated": [{"phase": p, "part": part, "bytes": n} for (p, part), n in sorted(allocated.items())],
        "read": [{"phase": p, "what": what, "count": n} for (p, what), n in sorted(read.items())],
    }
    out.write_text(json.dumps(result))
    os._exit(code or 0)


# ----------------------------------------------------------------------------------------------------------- the report


def figures(counted: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Part -> what a rank does in a steady step; and this package's `start: …` and `evaluation: …`."""
    steady = counted["steady_phase"]
    table: dict[str, dict[str, float]] = {}

    def entry(part: str) -> dict[str, float]:
        return table.setdefault(part, dict.fromkeys(("collectives", "message bytes", "bytes sent", "allocated"), 0))

    for row in counted["collectives"]:
        if row["who"] == "torch" or (row["who"] == "Megatron" and row["phase"] != steady):
            continue
        at = entry(row["part"] if row["phase"] == steady else f"{row['phase']}: {row['part']}")
        at["collectives"] += row["calls"]
        at["message bytes"] += row["calls"] * row["bytes"]
        at["bytes sent"] += row["sent"]
    for row in counted["allocated"]:
        if row["phase"] in (steady, "evaluation"):
            entry(row["part"] if row["phase"] == steady else f"evaluation: {row['part']}")["allocated"] += row["bytes"]
    for row in counted["read"]:
        if row["phase"] == steady:
            entry("data")[row["what"] + " read"] = row["count"]
    # Phases of steps before the steady one differ by what is made once; they are in the counts.
    return {part: values for part, values in sorted(table.items()) if not part.startswith("step ")}


def growing(small: dict[str, dict[str, float]], large: dict[str, dict[str, float]]) -> list[str]:
    """What this package does more of at many ranks than at few. Bytes sent over a ring follow from the messages."""
    return [
        f"{part}: {what} {small.get(part, {}).get(what, 0):,.0f} -> {value:,.0f}"
        for part, values in large.items()
        if part not in ("Megatron", "CPU mode", "evaluation: CPU mode")
        for what, value in values.items()
        if what != "bytes sent" and value > small.get(part, {}).get(what, 0)
    ]


def draw(results: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ranks = sorted(results)
    figure, (sent, allocated) = pyplot.subplots(1, 2, figsize=(11, 4.6), sharex=True, layout="constrained")
    for part, label in (
        ("Megatron", "Megatron: gradients, parameters, tensor parallelism"),
        ("loss", "loss: one all-gather per micro-batch"),
        ("data", "data: broadcasts to tensor-parallel ranks"),
        ("metrics", "metrics: one all-reduce per report"),
    ):
        values = [results[n].get(part, {}).get("bytes sent", 0) for n in ranks]
        sent.plot(ranks, [value or float("nan") for value in values], "o-", label=label)
        if part != "Megatron":
            allocated.plot(ranks, [results[n].get(part, {}).get("allocated", 0) for n in ranks], "o-", label=part)
    sent.set(title="sent by a rank in a step (ring)", ylabel="bytes", yscale="log", xlabel="ranks", ylim=(50, None))
    allocated.set(
        title="allocated by this package in a step (reference loss)", ylabel="bytes", yscale="log", xlabel="ranks"
    )
    for axes in (sent, allocated):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, map(str, ranks))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"tensor parallelism min(8, ranks), the rest data parallelism; 2 packs of {SEQ_LENGTH} tokens per rank and"
        " step, counted with Megatron's fake process group",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="multiples of 8, and 1")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counted: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"}
        for ranks in [0, *sorted(args.ranks)]:  # 0 makes the data
            command = [sys.executable, __file__, "--count", str(folder), str(ranks)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{ranks} ranks: FAILED\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                return 1
            if ranks:
                counted[ranks] = json.loads((folder / f"{ranks}.json").read_text())
    results = {ranks: figures(each) for ranks, each in counted.items()}
    for ranks, table in results.items():
        print(f"{ranks} ranks")
        for part, values in table.items():
            print(f"  {part:<24}" + ", ".join(f"{what} {value:,.0f}" for what, value in values.items() if value))
    # With two data-parallel ranks every collective of the many is there.
    full = [ranks for ranks in results if ranks >= 16]
    grown = growing(results[full[0]], results[full[-1]]) if len(full) > 1 else []
    verdict = [f"MISS {each}" for each in grown] or [f"HIT nothing of this package grows from {full[0]} to {full[-1]}"]
    print("\n".join(verdict))
    import torch

    document = {
        "assumptions": (__doc__ or "").split("Assumptions, also in the results: ")[1].split("\n\n")[0].split("\n"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "seq_length": SEQ_LENGTH,
        "flags": FLAGS.split(),
        "verdict": verdict,
        "ranks": {str(ranks): table for ranks, table in results.items()},
        "counted": {str(ranks): each for ranks, each in counted.items()},
    }
    (args.out / "scale.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(results, args.out / "scale.png")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    if sys.argv[1:2] == ["--count"]:
        folder, number = Path(sys.argv[2]), int(sys.argv[3])
        make_data(folder) if number == 0 else count_rank(folder, number, folder / f"{number}.json")
    else:
        sys.exit(main())

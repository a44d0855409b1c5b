"""The memory that `megatron-idft plan` predicts beside what real trainings allocate, over small models and layouts.

    python tools/benchmarks/plan_memory.py --out RESULTS [--only NAME …] [--results FILE] [--measured]

Each case is a training of three steps by the real trainer on a CPU (gloo, local layers), in as many processes as the
layout wants. memory_probe.py counts every storage on every rank; `plan` gets the same flags. Compared are the number of
parameters (exactly), the bytes of weights, gradients and optimizer, the largest sum of activations and logits that was
alive at a time, and all of it together. Nothing in the formulas is fitted to these numbers.

Not in the prediction, and in the table as "rest": what else Python holds on a rank (the data loader's batches, random
states, indices). Goal: 10 % of the total on every rank. Beyond it: MISS, and exit code 1.

Written: RESULTS/<case>/rank<N>.json and the output of each run; FILE (default RESULTS/plan_memory_cpu.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).resolve().parent)]
GOAL = 0.10
# No DataLoader workers: the memory of a rank is that of its own process.
SAME = """
    --cpu --seq-length 256 --max-position-embeddings 256 --micro-batch-size 2 --global-batch-size 8
    --lr 1e-3 --lr-decay-style constant --num-workers 0 --log-interval 1 --chat-template chatml --seed 1 --train-iters 3
    --eval-interval 1000
"""
LLAMA = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 8 --make-vocab-size-divisible-by 4096 --normalization RMSNorm
    --swiglu --disable-bias-linear --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
"""
UNTIED = "--untie-embeddings-and-output-weights"
GQA = "--group-query-attention --num-query-groups 2"
EXPERTS = (
    f"{LLAMA} {UNTIED} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256"
    " --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none --moe-router-force-load-balancing"
)
FUSED = "--sft-loss idft --sft-loss-head fused"
HYBRID = LLAMA.replace("--num-layers 4", "--hybrid-layer-pattern=*-*-")
# name -> (processes, flags). The plan is made for "gloo": the same rank program as on one GPU each.
CASES: dict[str, tuple[int, str]] = {
    "one process, fp32": (1, LLAMA),
    "one process, bf16": (1, f"{LLAMA} --bf16"),
    "GPT-2 shape, dropout": (
        1,
        "--num-layers 4 --hidden-size 128 --num-attention-heads 8 --make-vocab-size-divisible-by 4096",
    ),
    "Qwen3 shape, GQA": (1, f"{LLAMA} {UNTIED} {GQA} --qk-layernorm --bf16"),
    "weights outweigh": (
        1,
        f"{LLAMA} {UNTIED} --bf16 --hidden-size 512 --ffn-hidden-size 2048 --seq-length 64 --micro-batch-size 1",
    ),
    "TP 2": (2, f"{LLAMA} --tensor-model-parallel-size 2"),
    "TP 2 with sequence parallelism, bf16": (
        2,
        f"{LLAMA} {UNTIED} {GQA} --tensor-model-parallel-size 2 --sequence-parallel --bf16",
    ),
    "PP 2": (2, f"{LLAMA} {UNTIED} --pipeline-model-parallel-size 2"),
    "PP 2, two chunks each": (
        2,
        f"{LLAMA} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "DP 2": (2, LLAMA),
    "DP 2, distributed optimizer, bf16": (2, f"{LLAMA} {UNTIED} --use-distributed-optimizer --bf16"),
    "full recompute": (
        1,
        f"{LLAMA} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "full recompute of blocks, PP 2, bf16": (
        2,
        f"{LLAMA} {GQA} --bf16 --pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method block"
        " --recompute-num-layers 1",
    ),
    "selective recompute": (1, f"{LLAMA} --bf16 --recompute-granularity selective"),
    "selective recompute of MLPs": (
        1,
        f"{LLAMA} {UNTIED} --recompute-granularity selective --recompute-modules core_attn mlp",
    ),
    "experts, EP 2": (2, f"{EXPERTS} --expert-model-parallel-size 2"),
    "experts, TP 2, EP 2, bf16": (
        2,
        f"{EXPERTS} --bf16 --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
        " --expert-tensor-parallel-size 1",
    ),
    "HybridModel": (1, f"{HYBRID} {UNTIED} --bf16"),
    "HybridModel, PP 2, distributed optimizer": (
        2,
        f"{HYBRID} {UNTIED} --pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    # The formulas had been written when these were first run.
    "GPT-2 shape, dropout, TP 2 with sequence parallelism, bf16": (
        2,
        f"--num-layers 4 --hidden-size 128 --num-attention-heads 8 --make-vocab-size-divisible-by 4096 {UNTIED} --bf16"
        " --tensor-model-parallel-size 2 --sequence-parallel --attention-softmax-in-fp32",
    ),
    "shared experts, every other layer, PP 2": (
        2,
        f"{EXPERTS} --moe-layer-freq ([1,0]*2) --moe-shared-expert-intermediate-size 192 --bf16"
        " --pipeline-model-parallel-size 2",
    ),
    "groups of two recomputed, two chunks": (
        2,
        f"{LLAMA} {UNTIED} {GQA} --num-layers 8 --pipeline-model-parallel-size 2"
        " --num-layers-per-virtual-pipeline-stage 2 --recompute-granularity full --recompute-method uniform"
        " --recompute-num-layers 2",
    ),
    "HybridModel, experts recomputed": (
        1,
        f"{EXPERTS} --hybrid-layer-pattern=*E*- --bf16 --recompute-granularity selective"
        " --recompute-modules core_attn moe",
    ),
    "SGD, no rope, TP 2, DP 2": (
        4,
        "--num-layers 2 --hidden-size 192 --num-attention-heads 6 --make-vocab-size-divisible-by 1024 --swiglu"
        f" --position-embedding-type none {GQA} --tensor-model-parallel-size 2 --optimizer sgd --sft-loss ce",
    ),
    "loss idft, reference": (
        1,
        f"{LLAMA} --sft-loss idft --make-vocab-size-divisible-by 16384 --sft-loss-vocab-size 16300",
    ),
    "loss idft, reference, bf16, TP 2": (
        2,
        f"{LLAMA} --sft-loss idft --bf16 --tensor-model-parallel-size 2 --make-vocab-size-divisible-by 8192",
    ),
    "fused head, fp32, tied": (
        1,
        f"{LLAMA} {FUSED} --make-vocab-size-divisible-by 16384 --sft-loss-vocab-size 16300",
    ),
    "fused head, TP 2 with sequence parallelism, bf16": (
        2,
        f"{LLAMA} {UNTIED} {FUSED} --sft-loss-chunk-tokens 64 --bf16 --tensor-model-parallel-size 2"
        " --sequence-parallel --make-vocab-size-divisible-by 16384",
    ),
}


def flags_of(case: str, data: Path) -> list[str]:
    """The flags of a training, the same for the trainer and the plan."""
    words = f"{SAME} {CASES[case][1]}".split()
    return [*words, "--sft-data", str(data / "train.jsonl"), "--tokenizer-model", str(data / "tokenizer.model")]


def measure(case: str, folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    """Train; what memory_probe.py counted on each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = CASES[case][0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(Path(__file__).with_name("memory_probe.py")), str(folder), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    with open(folder / "output.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(f"{case}: exit code {code}, see {folder / 'output.log'}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


STATES = ("weights", "gradients", "optimizer")
MOVING = ("activations", "logits and loss", "optimizer's temporaries")


def compared(plan: dict[str, Any], ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan's JSON beside memory_probe.py's, for each rank. Errors are predicted / measured - 1."""
    stages = plan["memory"]["stages"]
    rows = []
    for rank, found in enumerate(ranks):
        number = rank // (len(ranks) // len(stages))
        items = stages[number]["items"]
        peak = max(found["forward_backward"]["peak"], found["step"]["peak"])
        measured = {"states": sum(found[name] for name in STATES), "peak": peak, "buffers and rest": found["other"]}
        predicted = {
            "states": sum(items[name] for name in STATES),
            "peak": sum(items[name] for name in MOVING),
            "buffers and rest": items["work buffers"],
        }
        rows.append(
            {
                "rank": rank,
                "parameters": {"measured": found["parameters"], "predicted": plan["parameters"]["per_rank"][number]},
                "measured": measured | {"total": sum(measured.values())},
                "predicted": predicted | {"total": sum(predicted.values())},
                "logits at the peak": {
                    "measured": found["forward_backward"]["logits"],
                    "predicted": items["logits and loss"],
                },
                "moment": stages[number]["moment"],
                "error": {
                    "states": predicted["states"] / measured["states"] - 1,
                    "peak": predicted["peak"] / peak - 1,
                    "total": sum(predicted.values()) / sum(measured.values()) - 1,
                },
            }
        )
    return rows


def plan_of(flags: list[str], processes: int) -> dict[str, Any]:
    """What `megatron-idft plan` writes as JSON for these flags."""
    from megatron_idft.integration.plan.request import plan_from_flags
    from megatron_idft.planning.numbers import as_json

    return as_json(plan_from_flags(["--gpus", str(processes), *flags])[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), metavar="NAME", default=tuple(CASES))
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--measured", action="store_true", help="compare with what an earlier run left in RESULTS")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from training_steps import make_full_conversations

    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "tokenizer.model").exists():
        make_full_conversations(data, 40)
    report: dict[str, Any] = {"goal": GOAL, "cases": {}}
    missed = 0
    print(f"{'case':<60} rank   states MB        peak MB         total MB      errors: states    peak   total")
    for case in args.only:
        folder, flags = args.out / case.replace(" ", "_").replace(",", ""), flags_of(case, data)
        if args.measured:
            ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(CASES[case][0])]
        else:
            ranks = measure(case, folder, flags)
        rows = compared(plan_of(flags, len(ranks)), ranks)
        report["cases"][case] = {"processes": CASES[case][0], "flags": CASES[case][1].split(), "ranks": rows}
        for row in rows:
            exact = row["parameters"]["measured"] == row["parameters"]["predicted"]
            hit = exact and abs(row["error"]["total"]) <= GOAL
            missed += not hit
            pairs = "  ".join(
                f"{row['measured'][name] / 1e6:6.2f} {row['predicted'][name] / 1e6:6.2f}"
                for name in ("states", "peak", "total")
            )
            errors = " ".join(f"{row['error'][name]:+7.1%}" for name in ("states", "peak", "total"))
            verdict = "hit" if hit else "MISS"
            print(f"{case:<60} {row['rank']:>4} {pairs}   {errors}  {verdict}", flush=True)
    import megatron.core
    import torch

    report["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron": megatron.core.__version__,
    }
    path = args.results or args.out / "plan_memory_cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{missed} misses; {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The flags of `plan` itself."""

from __future__ import annotations

import argparse

from megatron_idft.planning.hardware import GPUS


def add_plan_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add them to a parser."""
    group = parser.add_argument_group(title="plan")
    add = group.add_argument
    add("--gpus", type=int, metavar="N", help="GPUs of the training, or processes with --cpu. Must be given.")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs that are joined by NVLink. Default 8.")
    add("--gpu", choices=tuple(GPUS), default="h100", help="GPU whose memory and dense bf16 peak count. Default h100.")
    add("--gpu-memory-gib", type=float, metavar="X", help="Memory of a GPU in GiB, instead of that of --gpu.")
    add("--peak-tflops", type=float, metavar="Y", help="Dense peak of a GPU in TFLOP/s, instead of that of --gpu.")
    add("--mfu", type=float, default=0.4, help="Share of the peak that is assumed to be reached. Default 0.4.")
    add(
        "--reserve-gib",
        type=float,
        metavar="X",
        help="Memory of a GPU that is left for what is not counted: CUDA context, NCCL, workspaces of libraries,"
        " fragmentation. Default 6, with --cpu 0.5.",
    )
    add(
        "--disk-gb-per-s",
        type=float,
        default=2.0,
        metavar="X",
        help="Speed at which checkpoints are written. Default 2.",
    )
    add("--layouts", type=int, default=5, metavar="N", help="How many of the layouts that fit are shown. Default 5.")
    add("--json", metavar="FILE", help="Also write every number, input and assumption to FILE as JSON.")
    return parser

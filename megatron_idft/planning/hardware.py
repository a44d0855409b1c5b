"""GPUs: memory and dense bf16 peak, from NVIDIA's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU that `plan` knows.

    Attributes:
        memory_gib: the total that the driver shows.
        peak_tflops: dense bf16, without sparsity.
    """

    name: str
    memory_gib: float
    peak_tflops: float


GPUS = {
    "a100": Gpu("A100 80GB", 79.3, 312.0),
    "h100": Gpu("H100 80GB SXM", 79.6, 989.0),
    "h200": Gpu("H200 141GB", 139.8, 989.0),
    "b200": Gpu("B200 180GB", 178.0, 2250.0),
}

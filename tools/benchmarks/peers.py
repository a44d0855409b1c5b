"""Other libraries' losses, called as their own integrations call them. Nothing of their code is here.

Megatron is the one that Python finds. The others may also lie in a folder of unpacked wheels (`--peers`), which is in
sys.path only while they are imported: Megatron would stumble over a Transformer Engine without its compiled part. One
that cannot be loaded is reported as absent, with the reason.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from emulated_group import EmulatedGroup
from implementations import Implementation
from torch import Tensor

IGNORED = -100


def load(folder: Path) -> tuple[list[Implementation], dict[str, str], dict[str, str]]:
    """Implementations, library -> reason of its absence, and library -> version."""
    return load_each(
        ("Megatron", "megatron-core", megatron, None),
        ("Liger", "liger-kernel", liger, folder),
        ("Transformer Engine", "transformer-engine", transformer_engine, folder),
        ("verl", "verl", verl, folder),
    )


def load_each[Found](
    *libraries: tuple[str, str, Callable[[], list[Found]], Path | None],
) -> tuple[list[Found], dict[str, str], dict[str, str]]:
    """What the adapters of these (library, distribution, adapter, folder to import it from) return, as `load`."""
    found: list[Found] = []
    absent: dict[str, str] = {}
    versions: dict[str, str] = {}
    for library, distribution, adapter, place in libraries:
        with importable(place):
            try:
                found += adapter()
                versions[library] = importlib.metadata.version(distribution)
            except Exception as error:
                # Anything can go wrong in someone else's import; all of it is a reason.
                absent[library] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, absent, versions


@contextlib.contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    before = list(sys.path)
    if folder is not None:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def constant(forward: float, backward: float) -> dict[str, Any]:
    """Bytes per element of bf16 and fp16 logits; the peers do the same work for ignored rows."""
    return {"forward_bytes": _for_halves(forward), "backward_bytes": _for_halves(backward)}


def _for_halves(count: float) -> Callable[[int, float], float]:
    return lambda width, trained: count if width == 2 else float("nan")


def megatron() -> list[Implementation]:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def unfused(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels, tp_group=group)

    common = {"reads_ignored_labels": False, "needs_group": True}
    return [
        # fp32 copy (2+4), max (4), subtract (8), exp (8), sum (4), divide (8); backward: scale (8), round to bf16 (6).
        Implementation("Megatron unfused", "ce", unfused, **constant(38, 14), **common),
        # torch.compile decides what it fuses: inferred from timings that Liger published, about 32 and 17.
        Implementation("Megatron native", "ce", fused_vocab_parallel_cross_entropy, **constant(32, 17), **common),
    ]


def liger() -> list[Implementation]:
    from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction

    def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
        return LigerVocabParallelCEFunction.apply(logits, labels, group, IGNORED, 0.0, "pytorch", "global")

    # max (2), exp from bf16 into fp32 (6); backward in the fp32 buffer (8), round to bf16 (6).
    return [Implementation("Liger vocab-parallel", "ce", run, **constant(8, 14))]


def transformer_engine() -> list[Implementation]:
    function = _transformer_engine_module().CrossEntropyFunction

    def loss(overwrite: bool) -> Callable[..., Tensor]:
        def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
            return function.apply(logits, labels, 0.0, False, group, IGNORED, overwrite)

        return run

    infinite = float("inf")
    # Its public function, which checks arguments and then does the same, accepts these two dtypes.
    common = {"empty_state": (-infinite, 0.0, -infinite, 0.0), "dtypes": (torch.bfloat16, torch.float32)}

    # Every row is read in forward, and copied unless it overwrites; ignored rows are only written in backward.
    def forward(passes: int) -> Callable[[int, float], float]:
        return lambda width, trained: passes * width

    backward = {"backward_bytes": lambda width, trained: width * (trained + 1)}
    return [
        Implementation(
            "Transformer Engine, overwriting", "ce", loss(True), forward_bytes=forward(1), **backward, **common
        ),
        Implementation(
            "Transformer Engine, copying", "ce", loss(False), forward_bytes=forward(2), **backward, **common
        ),
    ]


def _transformer_engine_module() -> types.ModuleType:
    """Its cross-entropy alone: two files of Triton and torch, under packages that load no compiled library."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'transformer_engine'")
    root = Path(spec.submodule_search_locations[0])
    mine = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformer_engine"}
    for name in mine:
        del sys.modules[name]
    try:
        for package in ("", "common", "common.triton", "pytorch", "pytorch.triton"):
            name = ".".join(filter(None, ("transformer_engine", package)))
            module = types.ModuleType(name)
            module.__path__ = [str(root.joinpath(*package.split(".")) if package else root)]
            sys.modules[name] = module
        jit = types.ModuleType("transformer_engine.pytorch.jit")
        jit.no_torch_dynamo = lambda *args, **kwargs: lambda function: function  # type: ignore[attr-defined]
        sys.modules[jit.__name__] = jit
        return importlib.import_module("transformer_engine.pytorch.cross_entropy")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules.update(mine)


def verl() -> list[Implementation]:
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    # This file alone: the package imports Ray and a trainer.
    path = Path(spec.submodule_search_locations[0]) / "utils" / "megatron" / "tensor_parallel.py"
    file_spec = importlib.util.spec_from_file_location("verl_tensor_parallel", path)
    assert file_spec is not None and file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)

    def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
        from megatron.core import parallel_state

        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group
        logits = logits.float()  # what its model wrapper hands over
        entropy = module.vocab_parallel_entropy(logits)
        # Its callers clone, since Megatron's loss overwrites fp32 logits.
        return module.vocab_parallel_log_probs_from_logits(logits.clone(), labels) + entropy

    counts = {"forward_bytes": None, "backward_bytes": None}
    return [
        Implementation(
            "verl log_prob+entropy", "statistics", run, **counts, reads_ignored_labels=False, needs_group=True
        )
    ]

"""Other libraries' output heads, called as their own integrations call them. Nothing of their code is here.

Where they lie and how one that cannot be loaded is reported: peers.py.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heads import IGNORED, Head, Inputs
from peers import load_each
from torch import Tensor


def load(folder: Path, with_kernels: bool) -> tuple[list[Head], dict[str, str], dict[str, str]]:
    """Heads, library -> reason of its absence, and library -> version.

    with_kernels: also those that are kernels for a GPU. TRL's torch code for a CPU stands in for them, slowly.
    """
    libraries = (
        ("Megatron", "megatron-core", megatron, None),
        ("Liger", "liger-kernel", liger, folder),
        ("Liger CuTe", "liger-kernel", liger_cute, folder),
        ("cut-cross-entropy", "cut-cross-entropy", cut_cross_entropy, folder),
        ("verl", "verl", verl, folder),
        ("TRL", "trl", trl, folder),
    )
    return load_each(*libraries[: None if with_kernels else 1])


def megatron() -> list[Head]:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def head(name: str, loss: Callable[..., Tensor], sixteen_bits: bool) -> Head:
        def run(inputs: Inputs) -> Tensor:
            logits = torch.nn.functional.linear(inputs.hidden, inputs.weight).unsqueeze(1)
            # Neither knows ignored labels: the caller masks.
            trained = inputs.labels >= 0
            labels = torch.where(trained, inputs.labels, 0).unsqueeze(1)
            values: Tensor = loss(logits if sixteen_bits else logits.float(), labels, inputs.group)
            return torch.where(trained, values.squeeze(1), 0.0).sum() * inputs.scale

        return Head(f"Megatron {name}, materialised", "ce", run, tensor_parallel=True, needs_group=True)

    def unfused(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        values: Tensor = vocab_parallel_cross_entropy(logits, labels, tp_group=group)
        return values

    return [
        head("unfused", unfused, sixteen_bits=False),
        head("native", fused_vocab_parallel_cross_entropy, sixteen_bits=True),
    ]


def liger() -> list[Head]:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def head(name: str, accumulate: torch.dtype | None) -> Head:
        def run(inputs: Inputs) -> Tensor:
            arguments = (inputs.hidden, inputs.weight, inputs.labels, None, None, IGNORED, 0.0, 0.0, "sum")
            loss: Tensor = function.apply(*arguments, None, False, accumulate)[0]
            return loss * inputs.scale

        return Head(name, "ce", run)

    return [head("Liger Triton", None), head("Liger Triton, dW in fp32", torch.float32)]


def liger_cute() -> list[Head]:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    module._load_sm90_function()  # raises where CUTLASS's Python package is absent
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def run(inputs: Inputs) -> Tensor:
        loss, _ = function.apply(inputs.hidden, inputs.weight, inputs.labels, 1.0, IGNORED, 1, True)
        return loss.sum() * inputs.scale

    return [Head("Liger CuTe, with entropy", "ce", run, products=4, rounds_logits=False)]


def cut_cross_entropy() -> list[Head]:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def head(name: str, filter_eps: str | None) -> Head:
        def run(inputs: Inputs) -> Tensor:
            named = {"ignore_index": IGNORED, "reduction": "sum", "filter_eps": filter_eps}
            loss: Tensor = function(inputs.hidden, inputs.weight, inputs.labels, **named)
            return loss * inputs.scale

        return Head(name, "ce", run, products=4, counts_trained=True, rounds_logits=False)

    return [head("cut-cross-entropy", "high"), head("cut-cross-entropy, no filter", None)]


def verl() -> list[Head]:
    """Its kernels with entropy: two files, under packages that import no trainer."""
    cuda = torch.cuda.is_available()
    device = _stub(
        "verl.utils.device",
        is_cuda_available=cuda,
        get_device_name=lambda: "cuda" if cuda else "cpu",
        get_device_capability=lambda: torch.cuda.get_device_capability() if cuda else (0, 0),
        get_torch_device=lambda: torch.cuda,
    )
    module = _without_packages("verl", ("utils", "utils.kernel"), [device], "utils.kernel.linear_cross_entropy")

    def run(inputs: Inputs) -> Tensor:
        labels = inputs.labels.clamp(min=0)  # it knows no ignored ones: the caller masks
        log_prob, _ = module.linear_cross_entropy(inputs.hidden, inputs.weight, labels, 1.0, "none", inputs.group)
        return -torch.where(inputs.labels >= 0, log_prob, 0.0).sum() * inputs.scale

    return [Head("verl, with entropy", "ce", run, products=4, rounds_logits=False, tensor_parallel=True)]


def trl() -> list[Head]:
    """Its chunked head with entropy: one file, whose backward asks a trainer for a context."""
    import contextlib

    trainer = _stub("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())
    module = _without_packages("trl", ("kernels", "trainer"), [trainer], "kernels.chunked_logprob")

    def run(inputs: Inputs) -> Tensor:
        kept = inputs.labels >= 0  # its trainer leaves the others out, too
        hidden, labels = inputs.hidden[kept], inputs.labels[kept]
        width = min(32768, inputs.weight.shape[0])  # its trainer's
        named = (hidden, inputs.weight, None, labels, 1.0, width, None, 1.0, ("entropy",))
        log_prob: Tensor = module.ChunkedLogProbFunction.apply(*named)[0]
        return -log_prob.sum() * inputs.scale

    return [Head("TRL, with entropy", "ce", run, products=4, counts_trained=True)]


def _stub(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def _without_packages(
    library: str, packages: tuple[str, ...], stubs: list[types.ModuleType], wanted: str
) -> types.ModuleType:
    """A module of a library whose packages are not run. It stays known under its name: it imports when it is called."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {library!r}")
    root = Path(spec.submodule_search_locations[0])
    for package in ("", *packages):
        name = f"{library}.{package}".rstrip(".")
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*package.split(".")) if package else root)]
        sys.modules[name] = module
    sys.modules.update({stub.__name__: stub for stub in stubs})
    return importlib.import_module(f"{library}.{wanted}")

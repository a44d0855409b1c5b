"""The findings of `megatron-idft doctor` on this machine.

Everything is found without importing Megatron or touching a GPU's memory, so it runs on a login node.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES

from megatron_idft.errors import BrokenLibraryError
from megatron_idft.integration.platform import upstream
from megatron_idft.integration.platform.gpu_libraries import GPULibraries, find_gpu_libraries, installed
from megatron_idft.integration.platform.local_flags import missing_flags


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        detail: what was found.
        ok: False if training cannot start because of it.
        remedy: a command or an action; empty where nothing needs doing.
    """

    name: str
    detail: str
    ok: bool = True
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order in which a person would mend them."""
    machine = (_python, _packages, _torch, _megatron, _combinations, _accelerators, _communication)
    return [finding for section in (*machine, _choices, _changes) for finding in section()]


def _python() -> Iterator[Finding]:
    served = sys.version_info >= (3, 12)
    yield Finding("python", platform.python_version(), served, "" if served else "use Python 3.12 or newer")


_INSTALL_MEGATRON = 'pip install "megatron-core[training]>=0.19.0,<0.20"'

# distribution -> why training needs it
_NEEDED = {
    "numpy": "arrays",
    "pyarrow": "Parquet and compressed records",
    "sentencepiece": "sentencepiece tokenizers",
    "jinja2": "chat templates and the pages of reports",
    "tqdm": "progress",
    "transformers": "Hugging Face tokenizers",
    "psutil": "torch_dist checkpoints",
    "tensorboard": "--tensorboard-dir",
    "pyyaml": "megatron.training's configuration",
}


def install_line(name: str) -> str | None:
    """The command that installs a package which a verb has not found; None for a name that is not one of ours."""
    if name == "torch":
        return 'pip install "megatron-idft[train]" (from a checkout: pip install -e ".[train]")'
    if name == "megatron":
        return _INSTALL_MEGATRON
    if name == "yaml":
        return "pip install pyyaml"
    ours = {
        "jinja2",
        "numpy",
        "pyarrow",
        "safetensors",
        "sentencepiece",
        "tqdm",
        "transformers",
        "triton",
        "psutil",
        "tensorboard",
    }
    return f"pip install {name}" if name in ours else None


def _packages() -> Iterator[Finding]:
    for distribution, why in _NEEDED.items():
        found = installed(distribution)
        yield Finding(
            distribution,
            found or f"missing; needed for {why}",
            bool(found),
            "" if found else f"pip install {distribution}",
        )


def _torch() -> Iterator[Finding]:
    found = installed("torch")
    if found is None:
        yield Finding("torch", "missing", False, "pip install torch")
        return
    import torch

    yield Finding("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")


def _megatron() -> Iterator[Finding]:
    from megatron_idft.integration.platform.compatibility import check_megatron_origin

    try:
        origin = check_megatron_origin()
    except RuntimeError as error:
        yield Finding("megatron", str(error), False, _INSTALL_MEGATRON)
        return
    yield Finding("megatron", origin.describe())
    helpers = any((origin.core / "datasets" / f"helpers_cpp{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    makefile = (origin.core / "datasets" / "Makefile").exists()
    yield Finding(
        "dataset helpers",
        "compiled" if helpers else "compiled at first start" if makefile else "missing from the wheel",
        helpers or makefile,
        "" if helpers else f"make -C {origin.core / 'datasets'}" if makefile else "reinstall megatron-core",
    )


def _combinations() -> Iterator[Finding]:
    if installed("packaging") is None:
        yield Finding("versions", "not compared: packaging is missing", remedy="pip install packaging")
        return
    from megatron_idft.integration.platform.combinations import conflicts

    found = list(conflicts())
    for wanting, requirement, version in found:
        name = wanting.split()[0]
        yield Finding(
            f"versions of {name}",
            f"{wanting} asks for {requirement}, here is {version}: not known to work together",
            remedy=f'pip install "{requirement}", or another {name}; two environments where both are needed',
        )
    if not found:
        yield Finding("versions", "the installed packages admit each other")


def _accelerators() -> Iterator[Finding]:
    if installed("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "none: training runs on the CPU with gloo")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor},"
            f" {properties.total_memory / 2**30:.0f} GiB",
        )
    yield from _gpu_libraries()


def _gpu_libraries() -> Iterator[Finding]:
    remedy = 'use an NGC PyTorch container, or pip install "transformer-engine[pytorch]"'
    without = "local layers are used; no FP8, no multi-latent attention, no context parallelism with packs"
    there = installed("transformer-engine") or installed("transformer-engine-torch")
    try:
        libraries = find_gpu_libraries()
    except BrokenLibraryError as error:
        yield Finding("transformer-engine", str(error), False, remedy)
        return
    if libraries.transformer_engine:
        yield Finding("transformer-engine", there or "imports")
    else:
        why = f"{there} does not import ({libraries.why_not})" if libraries.why_not else "missing"
        yield Finding("transformer-engine", f"{why}: {without}", remedy=remedy)
    # PyPI's `apex` is another project; NVIDIA's brings these extension modules.
    found = [
        text
        for text, here in (
            ("fused optimizers and norms", _apex_optimizer()),
            ("gradient-accumulation fusion", libraries.weight_gradient_kernel),
            ("fused softmax of local layers", libraries.softmax_kernel),
        )
        if here
    ]
    yield Finding(
        "apex",
        f"NVIDIA's, with {', '.join(found)}" if found else "missing: no gradient-accumulation fusion",
        remedy="" if found else "build it from github.com/NVIDIA/apex; PyPI's `apex` is another project",
    )


def _apex_optimizer() -> bool:
    return importlib.util.find_spec("amp_C") is not None


def _communication() -> Iterator[Finding]:
    if installed("torch") is None:
        return
    import torch.distributed as distributed

    gpu = _gpu_present()
    for name, here, needed in (
        ("nccl", distributed.is_available() and distributed.is_nccl_available(), gpu),
        ("gloo", distributed.is_available() and distributed.is_gloo_available(), not gpu),
    ):
        detail = ("available" if here else "missing from this torch") + ("" if needed else ", not needed here")
        yield Finding(name, detail, here or not needed, "" if here or not needed else "install another build of torch")


def _gpu_present() -> bool:
    import torch

    return torch.cuda.is_available()


def _choices() -> Iterator[Finding]:
    """The backend that each part will use."""
    if installed("torch") is None:
        return
    import torch

    from megatron_idft.inference.cache import cudnn_allowed
    from megatron_idft.loss.backends import resolve_backend

    gpu = _gpu_present()
    try:
        libraries = find_gpu_libraries() if gpu else GPULibraries(False)
    except BrokenLibraryError:
        libraries = GPULibraries(False)  # said above
    engine, apex = libraries.transformer_engine, gpu and _apex_optimizer()
    triton = installed("triton")
    slow = "missing: on a GPU the loss runs on its slower reference backend"
    yield Finding("triton", triton or slow, remedy="" if triton else "pip install triton")
    yield Finding("uses: device", "cuda" if gpu else "cpu")
    yield Finding("uses: communication", "nccl" if gpu else "gloo")
    added = " ".join(word for flag in missing_flags({}, libraries) for word in flag if word) if gpu else ""
    layers = "transformer_engine" if engine else "local"
    yield Finding("uses: layers", f"{layers}; the programs add {added}" if added else layers)
    yield Finding(
        "uses: optimizer",
        "Transformer Engine's FusedAdam" if engine else "apex's FusedAdam" if apex else "torch.optim",
    )
    yield Finding("uses: loss", resolve_backend("auto", torch.device("cuda" if gpu else "cpu")))
    flash = gpu and installed("flash-attn") is not None
    plans = "" if cudnn_allowed() else " without cuDNN"
    yield Finding("uses: decoding", f"attention by {'flash-attn and ' if flash else ''}SDPA{plans}")
    verify = installed("math-verify")
    yield Finding(
        "uses: verification",
        f"text, numbers, math-verify {verify}" if verify else "text and numbers only: math-verify is missing",
        remedy="" if verify else 'pip install "megatron-idft[verify]": realign compares formulas too',
    )
    yield _loss_works()


def _changes() -> Iterator[Finding]:
    """The changes that the programs will make to Megatron on this machine."""
    if installed("torch") is None or installed("megatron-core") is None:
        return
    try:
        engine = find_gpu_libraries().transformer_engine
    except BrokenLibraryError:
        engine = False  # said above
    here = {"CPU mode": not _gpu_present(), "without Transformer Engine": not engine}
    for where in dict.fromkeys(change.where for change in upstream.CHANGES):
        if here.get(where, True):
            names = [change.target.rpartition(":")[2] for change in upstream.CHANGES if change.where == where]
            yield Finding(f"changes: {where}", ", ".join(names))


def _loss_works() -> Finding:
    """One forward and backward pass of the loss on the device that training would use."""
    import torch

    from megatron_idft.loss import vocab_parallel_loss

    device = torch.device("cuda" if _gpu_present() else "cpu")
    try:
        logits = torch.zeros(2, 4, device=device, requires_grad=True)
        out = vocab_parallel_loss(logits, torch.tensor([1, -100], device=device))
        out.loss.sum().backward()
        assert logits.grad is not None
        right = bool(torch.isfinite(logits.grad).all()) and bool(logits.grad[1].eq(0).all())
    except Exception as error:  # whatever it is, the person who asked wants to read it
        return Finding("loss", f"failed on {device}: {error}", False, "report this with the lines above")
    return Finding("loss", f"runs forward and backward on {device}" if right else "wrong gradient", right)


def print_report(findings: list[Finding], write: Callable[[str], None] = print) -> bool:
    """Write the findings and a verdict; True if training can start."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL"
        write(f"{mark}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            write(f"      {'':<{width}}  -> {finding.remedy}")
    able = all(finding.ok for finding in findings)
    write("training can start" if able else "training cannot start: mend the lines marked FAIL")
    return able

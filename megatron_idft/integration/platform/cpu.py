"""Run the stock Megatron trainer on a machine without a GPU: `enable()` and `add_flags()`.

Megatron asks `torch.cuda` for a device, streams and random numbers at many places. `enable()` answers them on the
CPU, in this process, with what each place needs and no more; every replacement names the upstream file that needs
it. Nothing claims that a GPU exists: `torch.cuda.is_available()` is False for everybody, Transformer Engine and
Triton kernels included; the few questions of Megatron's own that must be answered otherwise are answered to the
asking module only (`_to_callers`).

Never imported where a GPU is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device as torch_device

from megatron_idft.errors import UnsupportedOnCPUError
from megatron_idft.integration.platform import compatibility, upstream
from megatron_idft.integration.platform.local_flags import LOCAL_LAYERS, add_missing, given_flags

# ---------------------------------------------------------------------------------------------------------------- flags

# Flags that are added unless the user decided, with their values.
_NEEDED: tuple[tuple[str, str | None], ...] = (
    ("--distributed-backend", "gloo"),
    ("--use-cpu-initialization", None),
    *LOCAL_LAYERS,
    # Compiled upstream; here they would be the same sums in another order than the plain layers'.
    ("--no-bias-gelu-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-bias-dropout-fusion", None),
)

_NO_TE = "it needs Transformer Engine; leave it out"
_NO_STREAMS = "there are no CUDA streams to overlap; leave it out"
_NO_GRAPHS = "there are no CUDA graphs; leave it out"
_NO_DEVICE = "there is no device memory to offload from; leave it out"
_NO_FSDP = "it works on CUDA devices only; use --use-distributed-optimizer"
_NO_PROFILER = "there is no CUDA profiler; leave it out"

# flag -> (the values that work, () if none does; what to do instead)
_REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "--distributed-backend": (("gloo",), "use gloo, or leave it out"),
    "--transformer-impl": (("local",), "Transformer Engine needs a GPU; use local, or leave it out"),
    "--attention-backend": (("auto", "local", "unfused"), "there is one attention, the unfused; leave it out"),
    "--use-flash-attn": ((), "FlashAttention needs a GPU; leave it out"),
    "--fp8-format": ((), "FP8 needs a GPU; use --bf16"),
    "--fp4-format": ((), "FP4 needs a GPU; use --bf16"),
    "--sft": ((), "packed sequences need Transformer Engine's attention; use unpacked batches"),
    "--multi-latent-attention": ((), "the local attention does not take its shapes; it needs Transformer Engine"),
    "--moe-grouped-gemm": ((), "leave it out: the experts run one after another"),
    "--moe-permute-fusion": ((), _NO_TE),
    "--moe-router-fusion": ((), _NO_TE),
    "--moe-token-dispatcher-type": (("allgather", "alltoall"), "use allgather or alltoall"),
    "--tp-comm-overlap": ((), _NO_TE),
    "--te-rng-tracker": ((), _NO_TE),
    "--use-precision-aware-optimizer": ((), _NO_TE),
    "--overlap-moe-expert-parallel-comm": ((), _NO_STREAMS),
    "--cuda-graph-impl": (("none",), _NO_GRAPHS),
    "--enable-cuda-graph": ((), _NO_GRAPHS),
    "--external-cuda-graph": ((), _NO_GRAPHS),
    "--optimizer-cuda-graph": ((), _NO_GRAPHS),
    "--optimizer-cpu-offload": ((), _NO_DEVICE),
    "--cpu-offloading-num-layers": ((), _NO_DEVICE),
    "--fine-grained-activation-offloading": ((), _NO_DEVICE),
    "--use-megatron-fsdp": ((), _NO_FSDP),
    "--use-torch-fsdp2": ((), _NO_FSDP),
    "--use-nccl-ub": ((), "there is no NCCL; leave it out"),
    "--profile": ((), _NO_PROFILER),
    "--record-memory-history": ((), _NO_PROFILER),
    "--log-memory-to-tensorboard": ((), "there is no device memory to log; leave it out"),
    "--log-device-memory-used": ((), "there is no device memory to log; leave it out"),
}

# training/arguments.py asserts it with tensor or context parallelism.
_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def add_flags(argv: Sequence[str], program_name: str, *, announced: bool = True) -> list[str]:
    """`argv` (without the program) plus the Megatron flags that the CPU needs and the user did not give.

    Sets the environment variables that Megatron wants as well.

    Args:
        argv: the flags.
        program_name: for the line and for errors.
        announced: say in one line on rank 0 what was added.

    Raises:
        UnsupportedOnCPUError: a flag cannot work on the CPU; names the remedy.
    """
    given = given_flags(argv)
    for flag, (allowed, remedy) in _REFUSED.items():
        if flag in given and given[flag] not in allowed:
            asked = f"{flag} {given[flag]}".strip()
            raise UnsupportedOnCPUError(f"{program_name}: {asked} does not work on the CPU: {remedy}.")
    if "--num-experts" in given and "--disable-bias-linear" not in given:
        # transformer/mlp.py adds the bias in place to the output of a custom autograd function, which torch forbids.
        raise UnsupportedOnCPUError(
            f"{program_name}: local experts with a bias cannot be trained: add --disable-bias-linear."
        )
    environment = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(environment)
    also = " ".join(f"{name}={value}" for name, value in environment.items())
    return add_missing(argv, _NEEDED, program_name, "no GPU in use, running on the CPU", also=also, announced=announced)


# ----------------------------------------------------------------------------------------------------------------- shim

_enabled = False


def enable(trainer: bool = True) -> None:
    """Install the shim into torch and megatron in this process; a second call does nothing.

    Call it before any megatron module does anything with a device. Hides GPUs that the machine may have. Raises
    UnsupportedOnCPUError if this process already uses one, or has already imported a library of GPU kernels.

    Args:
        trainer: also prepare megatron.training. False serves the models of a megatron-core whose trainer is not served.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_initialized():
        raise UnsupportedOnCPUError(
            "CPU mode was asked for, but this process already uses a GPU: enable it before anything else."
        )
    # On a CPU nobody misses these libraries, and a newcomer reads twenty lines of it before the first that matters.
    warnings.filterwarnings(
        "ignore", message=r".*Apex (is|are) not installed|Only transformer-engine", module="megatron"
    )
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    _hide_gpu_libraries()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _redirect_devices()
    _stub_cuda()
    _split_random_state()
    if trainer:
        _patch_megatron()
    _enabled = True


# Megatron uses these whenever they import, and on a login node of a GPU cluster they do; then it calls their kernels.
_GPU_LIBRARIES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
    "flash_attn",
    "flash_attn_3",
    "grouped_gemm",
    "mamba_ssm",
    "causal_conv1d",
    "deep_ep",
)


def _hide_gpu_libraries() -> None:
    for name in _GPU_LIBRARIES:
        if sys.modules.get(name) is not None:
            raise UnsupportedOnCPUError(
                f"CPU mode was asked for, but {name} is already imported: enable it before megatron."
            )
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(_GPU_LIBRARIES))  # None makes `import name` raise ModuleNotFoundError


def _to_callers(modules: tuple[str, ...], answer: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives `answer` to code of the named modules (or packages) and stays `real` for everybody else."""

    @functools.wraps(real)
    def function(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        chosen = any(caller == name or caller.startswith(name + ".") for name in modules)
        return (answer if chosen else real)(*args, **kwargs)

    return function


def _constant(function: Callable[..., Any], value: Any) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *_: value)


def _on_cpu(device: Any) -> Any:
    """The CPU for anything that means a CUDA device ("cuda:0", torch.device("cuda"), an index), else the same."""
    is_cuda = (
        (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, int) and not isinstance(device, bool))
        or (isinstance(device, torch.device) and device.type == "cuda")
    )
    return torch.device("cpu") if is_cuda else device


def _redirect_devices() -> None:
    """`device="cuda"` and `.cuda()` give CPU tensors: schedules.py, optimizer/, layers.py and many more write them out.

    Plain wrappers and not a TorchFunctionMode: a mode holds for one thread only and costs every operation.
    """
    # `with torch.device(...)` knows factories by identity, in a set cached at first use: let it hold the originals.
    factories = {function.__name__ for function in torch_device._device_constructors()}

    def redirect(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return function(*args, **kwargs)

        return wrapper

    for name in dir(torch):
        if name in factories or name.endswith("_like"):
            setattr(torch, name, redirect(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(tensor, name, redirect(getattr(tensor, name)))

    to = tensor.to

    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_on_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        moved: torch.Tensor = to(self, *args, **kwargs)
        return moved

    tensor.to = to_cpu
    tensor.cuda = lambda self, *args, **kwargs: self


class _Stream:
    """Stands for a CUDA stream: the CPU does everything in order, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:  # something to synchronize with: itself
        return self

    def synchronize(self) -> None: ...


def _stub_cuda() -> None:
    cuda: Any = torch.cuda

    # training/initialize.py asserts a GPU, and sets up model parallelism and seeds only if it counts at least one.
    start = ("megatron.training.initialize",)
    # Everybody else hears that there is none, also where torch had counted one before it was hidden.
    cuda.is_available = _to_callers(start, lambda: True, _constant(cuda.is_available, False))
    cuda.device_count = _to_callers(start, lambda: 1, _constant(cuda.device_count, 0))
    # training/utils/common_utils.py asks for the architecture, as arguments.py demands less on Blackwell; 0 is older.
    common = ("megatron.training.utils.common_utils",)
    cuda.get_device_properties = _to_callers(common, lambda *_: SimpleNamespace(major=0), cuda.get_device_properties)
    # Device 0 is an index that _on_cpu understands; everything in core/ passes it on as `device=`.
    cuda.current_device = lambda: 0
    # training/initialize.py picks the device of the local rank.
    cuda.set_device = lambda device: None
    # core/timers.py, p2p_communication.py and the checkpoint writers wait for the device.
    cuda.synchronize = lambda device=None: None
    # training/training.py wraps the model for data parallelism on a stream of its own; dispatchers and DDP have theirs.
    cuda.Stream = _Stream
    cuda.current_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()

    # core/jit.py and router.py compile small functions: inductor would need a C++ compiler and seconds at start.
    def eager(model: Any = None, **_: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = _to_callers(("megatron",), eager, torch.compile)

    # optimizer/{clip_grads,optimizer,distrib_optimizer}.py sort parameters by the name of their CUDA type.
    name_of = torch.Tensor.type

    def cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = name_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    torch.Tensor.type = _to_callers(("megatron.core.optimizer",), cuda_name, name_of)  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------- random numbers

# Megatron saves "host" as the CPU's state; "loaders" seeds the workers of DataLoaders.
_aside: dict[str, torch.Tensor] = {}


def _split_random_state() -> None:
    """Three random streams where the CPU has one generator.

    Dropout on CPU tensors draws from torch's default generator, so that one plays the GPU's: `torch.cuda`'s states
    are its states, and Megatron's CudaRNGStatesTracker forks it by name as it would fork the GPU's. What Megatron
    calls the CPU's state is kept aside and swapped in while a DataLoader works: only tensor-parallel rank 0 has a
    DataLoader, and a number drawn there from the generator of the dropout masks would make the ranks of one model
    disagree about them. The seeds that a DataLoader draws when it starts have a stream of their own, for it starts
    once more in a resumed run.
    """
    generator = torch.default_generator

    def device_state(device: Any = "cuda") -> torch.Tensor:
        return generator.get_state()

    def set_device_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        if state.numel() != generator.get_state().numel():
            raise UnsupportedOnCPUError(
                "This checkpoint's random state was saved on a GPU and cannot continue on the CPU: "
                "resume with --no-load-rng."
            )
        generator.set_state(state)

    def seed_device(seed: int) -> None:
        generator.manual_seed(seed)

    def seed_all(seed: int) -> torch.Generator:
        generator.manual_seed(seed)
        _aside.update(host=generator.get_state(), loaders=generator.get_state())
        return generator

    def set_host_state(state: torch.Tensor) -> None:
        _aside["host"] = state

    seed_all(torch.initial_seed())
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = device_state  # checkpointing.py, tensor_parallel/random.py
        module.set_rng_state = set_device_state  # checkpointing.py
        module.manual_seed = seed_device  # tensor_parallel/random.py
    # Megatron's own goes through the CUDA generators.
    upstream.replace("megatron.core.tensor_parallel.random:_set_cuda_rng_state", set_device_state)

    owners = (
        "megatron.core.tensor_parallel.random",
        "megatron.core.rerun_state_machine",
        "megatron.training.checkpointing",
    )
    torch.get_rng_state = _to_callers(owners, lambda: _aside["host"], torch.get_rng_state)
    torch.set_rng_state = _to_callers(owners, set_host_state, torch.set_rng_state)
    torch.manual_seed = _to_callers(("megatron.training.initialize",), seed_all, torch.manual_seed)

    def drawing_from(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            device = generator.get_state()
            generator.set_state(_aside[name])
            try:
                return function(*args, **kwargs)
            finally:
                _aside[name] = generator.get_state()
                generator.set_state(device)

        return wrapper

    loader: Any = importlib.import_module("torch.utils.data.dataloader")
    loader.DataLoader.__iter__ = drawing_from("loaders", loader.DataLoader.__iter__)
    loader._BaseDataLoaderIter.__next__ = drawing_from("host", loader._BaseDataLoaderIter.__next__)


def _patch_megatron() -> None:
    from megatron_idft.integration.platform import local_layers  # noqa: PLC0415  imports Megatron

    local_layers.install()
    compatibility.repair_compile_helpers()
    compatibility.repair_distributed_optimizer_load()
    # training/initialize.py warms up compiled functions with random inputs. Nothing is compiled here, and the numbers
    # drawn, which depend on the layout, would come from the generator that then initialises the weights.
    upstream.replace("megatron.training.initialize:_warmup_jit_function", lambda *_, **__: None)

    # transformer/moe/token_dispatcher.py turns the split sizes of its all-to-all into numpy if they are CUDA tensors.
    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    upstream.replace("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", on_host)

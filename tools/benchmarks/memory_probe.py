"""Train a few steps with the real trainer and count what each rank allocates: one rank's part of plan_memory.py.

    torchrun … tools/benchmarks/memory_probe.py OUT <flags of `megatron-idft train`>

Weights, gradient buffers and optimizer states are counted by walking the real objects after the first step. During the
second step every storage that an operation makes is followed until it is freed; OUT/rank<N>.json tells the largest sum
that was alive at a time, in forward and backward and in the optimizer's step. A third step repeats the second and
takes stock of what was alive at the peak: which line made it. Memory that an operation allocates and frees inside
itself is not seen.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROJECT = ("megatron/", "megatron_idft/")


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages below `tensors`."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


class StorageCounter(TorchDispatchMode):
    """Follows every storage made while it is entered.

    Attributes:
        live, peak: bytes of the storages made since `__enter__` and not yet freed: now, and at most.
        peak_at: the number of the operation after which `peak` was first reached.
        vocabulary: columns that mark a tensor as logits.
    """

    def __init__(self, vocabulary: int, known: dict[int, Any], stock_at: int = -1) -> None:
        super().__init__()
        self.vocabulary, self.stock_at = vocabulary, stock_at
        self.known = set(known)
        for key, storage in known.items():  # an address that is freed may be given to a new storage
            weakref.finalize(storage, self.known.discard, key)
        self.live = self.peak = self.operations = self.peak_at = self.logits_at_peak = 0
        self._sizes: dict[int, tuple[int, bool, str]] = {}
        self.stock: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self._follow(value, function)
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, self.operations
            self.logits_at_peak = sum(size for size, is_logits, _ in self._sizes.values() if is_logits)
        if self.operations == self.stock_at:
            for size, _, origin in self._sizes.values():
                self.stock[origin] += size
        return result

    def _follow(self, tensor: torch.Tensor, function: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        if key in self._sizes:
            before, is_logits, origin = self._sizes[key]
            if before != size:  # resized in place
                self._sizes[key] = (size, is_logits, origin)
                self.live += size - before
            return
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        origin = f"{_origin()} {function} {list(tensor.shape)} {tensor.dtype}" if self.stock_at >= 0 else ""
        self._sizes[key] = (size, is_logits, origin)
        self.live += size
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, (0, False, ""))[0]


def _origin() -> str:
    """The innermost line of Megatron's or ours that is running."""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        for folder in PROJECT:
            if folder in name:
                return f"{name[name.rindex(folder) :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"


def all_storages() -> dict[int, Any]:
    """Every storage that a Python tensor of this process holds, by identity."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided:
            storage = item.untyped_storage()
            found[storage._cdata] = storage
    return found


def persistent(model: list[torch.nn.Module], optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer, and the number of parameters of this rank."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [*parameters, *(buffer.param_data for buffer in buffers if buffer.param_data is not None)]
    states: list[Any] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue
        states += [value for state in inner.state.values() for value in state.values()]
        states += [parameter for group in inner.param_groups for parameter in group["params"]]
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(buffer.grad_data for buffer in buffers),
        "optimizer": storage_bytes(
            state for state in states if isinstance(state, torch.Tensor) and state.untyped_storage()._cdata not in own
        ),
    }


def watch(folder: Path) -> None:
    """Wrap the trainer's `train_step`. Call it after the loss has been attached."""
    from megatron.training import get_args, training

    original, steps, result = training.train_step, [0], {}

    def train_step(forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **more: Any) -> Any:
        steps[0] += 1
        if steps[0] not in (2, 3):
            return original(forward_step, data, model, optimizer, *rest, **more)
        args = get_args()
        if steps[0] == 2:
            result.update(persistent(model, optimizer))
            everything = sum(storage.nbytes() for storage in all_storages().values())
            result["other"] = everything - sum(result[name] for name in ("weights", "gradients", "optimizer"))
        columns = args.padded_vocab_size // args.tensor_model_parallel_size
        counters = []

        def counted(name: str, function: Callable) -> Callable:
            def call(*positional: Any, **named: Any) -> Any:
                stock_at = result[name]["peak_at"] if steps[0] == 3 else -1
                counter = StorageCounter(columns, all_storages(), stock_at)
                counters.append((name, counter))
                with counter:
                    return function(*positional, **named)

            return call

        words = list(rest)
        position = next(i for i, value in enumerate(words) if callable(value) and "forward_backward" in str(value))
        words[position] = counted("forward_backward", words[position])
        step = optimizer.step
        optimizer.step = counted("step", step)
        try:
            return original(forward_step, data, model, optimizer, *words, **more)
        finally:
            optimizer.step = step
            for name, counter in counters:
                if steps[0] == 2:
                    result[name] = {
                        "peak": counter.peak,
                        "peak_at": counter.peak_at,
                        "logits": counter.logits_at_peak,
                        "kept": counter.live,
                    }
                else:
                    result[name]["repeated_peak"] = counter.peak
                    result[name]["stock"] = dict(counter.stock.most_common(60))
            (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(result, indent=1))

    training.train_step = train_step


def main() -> None:
    folder, argv = Path(sys.argv[1]), sys.argv[2:]
    from megatron_idft.integration.platform.hf_model import expand
    from megatron_idft.integration.platform.start import prepare_process
    from megatron_idft.integration.training.program import ChatTraining, train

    prepare_process("memory_probe", expand(argv), force_cpu=True)
    attach = ChatTraining.attach

    def attach_and_watch(self: ChatTraining) -> ChatTraining:
        attach(self)
        watch(folder)
        return self

    ChatTraining.attach = attach_and_watch  # type: ignore[method-assign]
    train()


if __name__ == "__main__":
    main()

"""What a CUDA graph could not capture, found without a GPU: operations on fake CUDA tensors that need the host."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class HostNeededError(Exception):
    """An operation waits for the host, or for memory of the host."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        # Numbers of the host enter a kernel by value where it takes them so, and else by a copy that is waited for.
        if len({x.device.type for x in tensors}) > 1 or function is torch.ops.aten.lift_fresh.default:
            raise HostNeededError(f"{function} of {[str(x.device) for x in tensors]}")
        return result


@contextlib.contextmanager
def captured(monkeypatch: Any, before: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """Tensors have no memory, on any device; whatever a stream could not record raises.

    Operations whose result or shape depends on values raise by themselves: a fake tensor has none. `before` makes what
    exists already when the capture begins, and is what `with` gives.
    """
    with monkeypatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())  # asks the driver
        patch.setattr(torch.Tensor, "data_ptr", lambda _: 0)  # aligned
        made = before()
        with _Watch():
            yield made

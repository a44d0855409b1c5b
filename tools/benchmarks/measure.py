"""Time, memory and correctness of one implementation on one set of logits.

What a measured call sees is the same for all. The logits are an intermediate result in a buffer that is refilled before
each call, since overwriting losses destroy them. Then a read of 256 MiB pushes them out of the L2 cache and leaves no
dirty lines that a measured kernel would have to write back. Then the device idles for about a millisecond while Python
queues the call, so that events time the device's work and not the launches; the time that Python takes is recorded
beside it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from emulated_group import EmulatedGroup
from implementations import Implementation, expected
from torch import Tensor

WARM_UP = 3
CHECKED_ROWS = 32
FLUSH_BYTES = 2**28
QUEUE_CYCLES = 2_000_000

# Largest error of a value, relative to max(1, |value|): sums of 10^5 fp32 terms, in any order, and their logarithm.
VALUE_TOLERANCE = 1e-3
# ||gradient - expected|| / ||expected||. One rounding to nearest costs 1.7e-3 in bf16 and 2e-4 in fp16.
GRADIENT_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-4}
INTERPRETER_TOLERANCE = 1e-2  # Triton's interpreter truncates where the GPU rounds to nearest


class OutputLayer(torch.autograd.Function):
    """Stands in for the layer that makes the logits: they are no leaf, and nobody else reads them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Callable[[], Tensor]) -> Tensor:
        return logits()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


@dataclasses.dataclass
class Times:
    """Milliseconds of each timed call. host: until Python had queued forward and backward."""

    forward: list[float] = dataclasses.field(default_factory=list)
    backward: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        total = [forward + backward for forward, backward in zip(self.forward, self.backward, strict=True)]
        figures: dict[str, Any] = {"host_ms": statistics.median(self.host), "calls": len(self.host)}
        for name, values in (("forward", self.forward), ("backward", self.backward), ("total", total)):
            figures[f"{name}_ms"] = statistics.median(values)
            figures[f"{name}_ms_min_max"] = [min(values), max(values)]
        return figures


class Bench:
    """Logits [s, b, V/tp], labels and an upstream gradient on a device, and everything measured on them."""

    def __init__(
        self,
        tokens: int,
        columns: int,
        dtype: torch.dtype,
        trained: float,
        group: EmulatedGroup,
        device: torch.device,
    ) -> None:
        self.device, self.group, self.dtype, self.columns = device, group, dtype, columns
        batch = 4 if tokens % 4 == 0 else 1
        shape = (tokens // batch, batch)
        generator = torch.Generator(device).manual_seed(0)
        self.labels = torch.randint(0, columns, shape, generator=generator, device=device)
        self.source = torch.empty(*shape, columns, dtype=dtype, device=device)
        self.source.normal_(0, 2, generator=generator)
        # Targets from improbable to certain, as a model sees them: all parts of the objectives' range occur.
        boost = torch.rand(*shape, 1, generator=generator, device=device) * 16
        target = self.labels.unsqueeze(-1)
        self.source.scatter_(-1, target, (self.source.gather(-1, target) + boost).to(dtype))
        order = torch.randperm(tokens, generator=generator, device=device).view(shape)
        ignored = order >= round(trained * tokens)
        self.labels_with_ignored = torch.where(ignored, -100, self.labels)
        self.trained = 1.0 - float(ignored.float().mean())
        upstream = torch.rand(shape, generator=generator, device=device) + 0.5
        self.upstream = torch.where(ignored, 0.0, upstream)
        self.buffer = torch.empty_like(self.source)
        self.parameter = torch.zeros((), device=device, requires_grad=True)
        self.scratch = torch.zeros(FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)

    def _labels(self, implementation: Implementation) -> Tensor:
        return self.labels_with_ignored if implementation.reads_ignored_labels else self.labels

    def _group(self, implementation: Implementation) -> EmulatedGroup | None:
        return self.group if self.group.size() > 1 or implementation.needs_group else None

    def _refill(self) -> None:
        self.buffer.copy_(self.source)
        self.scratch.sum()
        if self.device.type == "cuda":
            torch.cuda._sleep(QUEUE_CYCLES)

    def _call(self, implementation: Implementation, times: Times | None = None) -> tuple[Tensor, Tensor | None]:
        """Values and the gradient with respect to the logits."""
        if implementation.empty_state:
            self.group.set_empty_state(torch.tensor(implementation.empty_state, device=self.device))
        labels, group = self._labels(implementation), self._group(implementation)
        self._refill()
        clock = Clock(self.device)
        gradient = None
        if implementation.formula == "statistics":
            with torch.no_grad():
                values = implementation.run(self.buffer, labels, group)
        else:
            logits = OutputLayer.apply(self.parameter, self.buffer.detach)
            clock.restart()
            values = implementation.run(logits, labels, group)
            clock.mark()
            (gradient,) = torch.autograd.grad(values, logits, self.upstream)
        clock.mark()
        if times is not None:
            forward, backward, host = clock.milliseconds()
            times.forward.append(forward)
            times.backward.append(backward)
            times.host.append(host)
        return values, gradient

    def check(self, implementation: Implementation) -> dict[str, Any]:
        """Errors against float64 on some rows, collectives, and peak memory of a second call."""
        self.group.reset()
        values, gradient = self._call(implementation)
        figures: dict[str, Any] = {"collectives": list(self.group.calls), "bytes_sent": round(self.group.bytes_sent)}
        if self.group.size() == 1:
            figures |= {"collectives": [], "bytes_sent": 0}
        figures |= self._errors(implementation, values, gradient)
        if self.device.type == "cuda":
            del values, gradient
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._call(implementation)
            figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return figures

    def _errors(self, implementation: Implementation, values: Tensor, gradient: Tensor | None) -> dict[str, Any]:
        tokens = self.labels.numel()
        rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=self.device).round().long()
        logits = self.source.view(tokens, -1)[rows]
        labels = self.labels_with_ignored.view(-1)[rows]
        want, want_gradient = expected(implementation.formula, logits, labels, self.upstream.view(-1)[rows])
        got = values.detach().reshape(-1)[rows].double()
        if not implementation.reads_ignored_labels:  # their callers mask the loss
            got = torch.where(labels >= 0, got, 0.0)
        value_error = ((got - want).abs() / want.abs().clamp(min=1)).max().item()
        figures: dict[str, Any] = {"value_error": value_error}
        right = value_error <= VALUE_TOLERANCE
        if want_gradient is not None:
            assert gradient is not None
            difference = gradient.reshape(tokens, -1)[rows].double() - want_gradient
            error = (difference.norm() / want_gradient.norm()).item()
            tolerance = GRADIENT_TOLERANCE[self.dtype]
            if self.device.type == "cpu" and self.dtype == torch.bfloat16:
                tolerance = INTERPRETER_TOLERANCE
            figures |= {"gradient_error": error, "gradient_dtype": str(gradient.dtype).removeprefix("torch.")}
            right = right and error <= tolerance
        figures["right"] = right
        return figures

    def call(self, implementation: Implementation) -> None:
        """Forward and backward once, untimed, on what the buffer holds."""
        logits = OutputLayer.apply(self.parameter, self.buffer.detach)
        values = implementation.run(logits, self._labels(implementation), self._group(implementation))
        torch.autograd.grad(values, logits, self.upstream)

    def time_call(self, implementation: Implementation, times: Times) -> None:
        self._call(implementation, times)

    def time_copy(self, times: Times) -> None:
        """Each byte of the logits read once and written once."""
        self._time(lambda: self.buffer.copy_(self.source), times)

    def time_read(self, times: Times) -> None:
        """Each byte of the logits read once, by torch's sum."""
        flat = self.source.view(-1)
        words = flat[: flat.numel() // 2 * 2].view(torch.float32) if flat.element_size() == 2 else flat
        self._time(words.sum, times)

    def _time(self, work: Callable[[], object], times: Times) -> None:
        self._refill()
        clock = Clock(self.device)
        work()
        clock.mark()
        forward, backward, host = clock.milliseconds()
        times.forward.append(forward)
        times.backward.append(backward)
        times.host.append(host)


class Clock:
    """Start, end of forward and, if there is one, of backward, on the device; the whole span on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.marks = [self._now()]

    def mark(self) -> None:
        self.marks.append(self._now())
        self.queued = time.perf_counter()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> tuple[float, float, float]:
        start, middle, *rest = self.marks
        end = rest[-1] if rest else middle
        host = (self.queued - self.started) * 1e3
        if self.device.type != "cuda":
            return (middle - start) * 1e3, (end - middle) * 1e3, host
        torch.cuda.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end), host

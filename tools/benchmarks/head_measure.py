"""Time, memory and correctness of one output head on one set of hidden states.

A call is a forward and a backward whose upstream gradient is that of a trainer: the same factor for every trained
token. Before each one the L2 cache is flushed and the device idles while Python queues, as in measure.py. Memory is
what a call needs at its peak beyond the gradients that it returns: on a GPU by torch's allocator, on a CPU by following
every storage that an operation makes. Heads that add to `main_grad` return none for the weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from emulated_group import EmulatedGroup
from heads import IGNORED, Head, Inputs
from measure import FLUSH_BYTES, QUEUE_CYCLES, Clock, Times
from memory_probe import StorageCounter, all_storages, storage_bytes
from torch import Tensor

CHECKED = 32  # rows of the hidden states' gradient, and columns of the weight's
BLOCK_BYTES = 2**28

# |loss - expected| / max(1, expected), and ||gradient - expected|| / ||expected|| of those rows and columns.
LOSS_TOLERANCE = 2e-3
GRADIENT_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-4}
# Logits near 8 are rounded to steps of 1/32 in bf16, so each probability is off by a percent; and some return a loss in
# bf16. Few tokens average less.
ROUNDED_LOSS_TOLERANCE, ROUNDED_TOKEN_TOLERANCE = 2e-2, 0.1
ROUNDED_LOGITS_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}


class HeadBench:
    """Hidden states [T, H], weight [V/tp, H] and labels on a device, and everything measured on them."""

    def __init__(
        self,
        tokens: int,
        width: int,
        columns: int,
        dtype: torch.dtype,
        trained: float,
        group: EmulatedGroup,
        device: torch.device,
    ) -> None:
        self.device, self.group = device, group
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weight = normal(columns, width).mul_(2 / width**0.5)  # so that logits have a spread of 2
        labels = torch.randint(0, columns, (tokens,), generator=generator, device=device)
        # Targets from improbable to certain, as a model sees them: each row of the weight has a norm of 2.
        boost = torch.rand(tokens, 1, generator=generator, device=device) * 4
        self.hidden = (normal(tokens, width) + boost * weight[labels]).to(dtype)
        self.weight = weight.to(dtype)
        del weight
        order = torch.randperm(tokens, generator=generator, device=device)
        self.labels = torch.where(order < round(trained * tokens), labels, IGNORED)
        self.trained = round(trained * tokens)
        self.main_grad = torch.zeros(columns, width, device=device)
        self.scratch = torch.zeros(FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)
        self.logits_bytes = tokens * columns * dtype.itemsize
        self._expect()

    def _expect(self) -> None:
        """Losses and gradients in float64, for both formulas: of some rows and columns, sums over all tokens."""
        rows = torch.nonzero(self.labels >= 0).squeeze(1)
        labels, hidden = self.labels[rows], self.hidden[rows]
        self.rows = torch.linspace(0, len(rows) - 1, min(len(rows), CHECKED), device=self.device).round().long()
        few = torch.linspace(0, len(self.weight) - 1, CHECKED // 2, device=self.device).round().long()
        self.columns = torch.cat([few, labels[self.rows[: CHECKED // 2]]]).unique()
        weight = self.weight.double()
        self.expected: dict[str, tuple[float, Tensor, Tensor]] = {}
        found: dict[str, list[Tensor]] = {"ce": [], "idft": []}
        step = max(BLOCK_BYTES // (8 * len(weight)), 1)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            log_probs = (hidden[part].double() @ weight.t()).log_softmax(-1)
            log_prob = log_probs.gather(1, labels[part, None]).squeeze(1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            idft = torch.exp(torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0) * log_prob)
            for formula, factor in (("ce", torch.ones_like(idft)), ("idft", idft)):
                # Of a row, what its gradient is beside its softmax: the factor and the normaliser.
                normaliser = log_prob - (hidden[part].double() * weight[labels[part]]).sum(-1)
                found[formula].append(torch.stack([-factor * log_prob, factor, normaliser]))
        for formula, parts in found.items():
            values, factor, normaliser = torch.cat(parts, dim=1)
            self.expected[formula] = (
                values.mean().item(),
                self._gradient(hidden[self.rows], weight, labels[self.rows], factor, normaliser, self.rows) @ weight,
                self._gradient(hidden, weight[self.columns], labels, factor, normaliser).t() @ hidden.double(),
            )
        self.rows = rows[self.rows]

    def _gradient(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        factor: Tensor,
        normaliser: Tensor,
        rows: Tensor | slice = slice(None),
    ) -> Tensor:
        """Of the mean loss with respect to the logits hidden weight^T, of all columns or of `self.columns`."""
        probs = (hidden.double() @ weight.t() + normaliser[rows, None]).exp()
        whole = len(weight) == len(self.weight)
        names = torch.arange(len(weight), device=self.device) if whole else self.columns
        return (probs - (labels[:, None] == names).double()) * (factor[rows, None] / len(factor))

    def _inputs(self, head: Head) -> Inputs:
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(head.kind != "frozen")
        weight.main_grad = self.main_grad  # type: ignore[attr-defined]
        group = self.group if self.group.size() > 1 or head.needs_group else None
        if head.empty_state:
            self.group.set_empty_state(torch.tensor(head.empty_state, device=self.device))
        return Inputs(hidden, weight, self.labels, self.trained, 1 / self.trained, group)

    def _call(self, head: Head, clock: Clock | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, and the gradients of hidden states and weight."""
        inputs = self._inputs(head)
        if clock is not None:
            clock.restart()
        loss = head.run(inputs)
        if clock is not None:
            clock.mark()
        leaves = [inputs.hidden] if head.kind == "frozen" else [inputs.hidden, inputs.weight]
        of_hidden, *rest = torch.autograd.grad(loss, leaves, allow_unused=True)
        if clock is not None:
            clock.mark()
        return loss.detach(), of_hidden, rest[0] if rest else None

    def check(self, head: Head) -> dict[str, Any]:
        """Errors, collectives, and memory of a second call."""
        self.group.reset()
        self.main_grad.zero_()
        loss, of_hidden, of_weight = self._call(head)
        figures: dict[str, Any] = {"collectives": list(self.group.calls), "bytes_sent": round(self.group.bytes_sent)}
        if self.group.size() == 1:
            figures = {"collectives": [], "bytes_sent": 0}
        if of_weight is None and head.kind != "frozen":
            of_weight = self.main_grad
        want, want_hidden, want_weight = self.expected[head.formula]
        figures["loss_error"] = abs(loss.item() - want) / max(1.0, abs(want))
        figures["hidden_error"] = _relative(of_hidden[self.rows], want_hidden)
        if of_weight is not None:
            figures["weight_error"] = _relative(of_weight[self.columns], want_weight)
            figures["weight_dtype"] = str(of_weight.dtype).removeprefix("torch.")
        tolerances, of_loss = GRADIENT_TOLERANCE, LOSS_TOLERANCE
        if head.rounds_logits:
            tolerances = ROUNDED_LOGITS_TOLERANCE
            of_loss = max(ROUNDED_LOSS_TOLERANCE, ROUNDED_TOKEN_TOLERANCE / self.trained**0.5)
        worst = max(figures["hidden_error"], figures.get("weight_error", 0.0))
        figures["right"] = figures["loss_error"] <= of_loss and worst <= tolerances[self.hidden.dtype]
        del loss, of_hidden, of_weight
        return figures | self._memory(head)

    def _memory(self, head: Head) -> dict[str, Any]:
        """Peak of a call, with and without the gradients that it returns; nothing where it cannot be counted."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = self._call(head)
            peak = torch.cuda.max_memory_allocated() - before
        elif head.opaque:
            return {}
        else:
            with StorageCounter(len(self.weight), all_storages()) as counter:
                results = self._call(head)
            peak = counter.peak
        extra = peak - storage_bytes(results[1:])
        return {"peak_bytes": peak, "extra_bytes": extra, "extra_over_logits": extra / self.logits_bytes}

    def time_call(self, head: Head, times: Times) -> None:
        self._settle()
        clock = Clock(self.device)
        self._call(head, clock)
        _append(times, clock)

    def time_products(self, count: int, rows: int, times: Times) -> None:
        """The head's matrix products alone, by torch's own calls: logits, both gradients, and the logits again.

        Args:
            count: 2 without the weight's gradient, 3, or 4 with the logits twice.
            rows: of the hidden states.
        """
        hidden, weight = self.hidden[:rows], self.weight
        logits = hidden.new_empty(rows, len(weight))
        of_hidden, of_weight = torch.empty_like(hidden), None if count == 2 else torch.empty_like(weight)
        self._settle()
        clock = Clock(self.device)
        for _ in range(count // 4 + 1):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=of_hidden)
        if of_weight is not None:
            torch.mm(logits.t(), hidden, out=of_weight)
        clock.mark()
        _append(times, clock)

    def shares(self, head: Head) -> dict[str, float]:
        """Milliseconds of a call in matrix products, in kernels of a loss, in collectives and in everything else.

        Of the device on a GPU, by torch's profiler; of the processor without one.
        """
        cuda = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
            self._call(head)
            if cuda:
                torch.cuda.synchronize()
        found = dict.fromkeys(("products", "loss", "collectives", "other"), 0.0)
        for event in profiler.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[_part(event.key.lower())] += spent / 1e3
        return {name: round(value, 3) for name, value in found.items()}

    def _settle(self) -> None:
        self.scratch.sum()
        if self.device.type == "cuda":
            torch.cuda._sleep(QUEUE_CYCLES)


PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "addmm", "wgmma")
LOSS = ("shard_state", "token_results", "gradient_kernel", "store_columns", "cross_entropy", "entropy")


def _part(kernel: str) -> str:
    groups: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("collectives", ("nccl", "c10d::")),
        ("products", PRODUCTS),
        ("loss", LOSS),
    )
    return next((name for name, words in groups if any(word in kernel for word in words)), "other")


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def _append(times: Times, clock: Clock) -> None:
    forward, backward, host = clock.milliseconds()
    times.forward.append(forward)
    times.backward.append(backward)
    times.host.append(host)


def in_turns(calls: dict[str, Callable[[Times], None]], count: int, warm_up: int) -> tuple[dict[str, Times], set[str]]:
    """Times of each, call by call, and who ran out of memory."""
    times = {name: Times() for name in calls}
    failed: set[str] = set()
    for turn in range(warm_up + count):
        if turn == warm_up:
            times = {name: Times() for name in calls}
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                call(times[name])
            except torch.cuda.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
    return {name: value for name, value in times.items() if name not in failed}, failed

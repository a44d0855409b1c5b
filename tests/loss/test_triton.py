"""What only the Triton backend promises: which memory it reads, what it launches, and shards merged in one process."""

import ctypes
import importlib.util
import math
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_idft import idft, resolve_objective, vocab_parallel_loss
from megatron_idft.loss import triton_backend, triton_kernels
from megatron_idft.loss.shard import VocabShard
from tests.loss.engines import Engine, interpreted
from tests.loss.intermediate import as_intermediate
from tests.loss.oracle import assert_matches, expected_loss, objective_of
from tests.loss.test_reference import LargestTensor
from tests.loss.test_vocab_parallel_loss import DTYPES, OBJECTIVES, make_inputs

PEERS = Path(__file__).parents[2] / ".cache" / "peers"  # made by tests/run.sh


# (padded vocabulary, true vocabulary, shards): the last shards of the second case hold padding only.
@pytest.mark.parametrize("padded,vocab,shards", [(4096, 4000, 2), (4096, 1100, 4), (10240, 10233, 8), (8, 8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_merged_in_one_process(
    triton_engine: Engine, dtype: torch.dtype, padded: int, vocab: int, shards: int
) -> None:
    logits, labels = make_inputs((3, 2), padded, dtype)
    labels.clamp_(max=vocab - 1)
    logits[..., vocab:] = math.nan
    upstream = torch.randn(3, 2)
    on_device, placed = triton_engine.place(logits), triton_engine.place(labels)
    width = padded // shards
    parts = [VocabShard(r * width, min(max(vocab - r * width, 0), width), width, None) for r in range(shards)]
    objective = idft()
    columns = on_device.chunk(shards, -1)
    states = torch.stack(
        [
            triton_backend.shard_state(part, placed, shard, vocab, objective.extra_statistics)
            for part, shard in zip(columns, parts, strict=True)
        ]
    )
    results = triton_backend.token_results(states, placed, objective, vocab, cross_entropy_values=False)
    gradients = [torch.full_like(part, math.nan) for part in columns]
    for part, gradient, shard in zip(columns, gradients, parts, strict=True):
        triton_backend.write_gradient(part, gradient, placed, triton_engine.place(upstream), results, shard, vocab)
    grad = torch.cat(gradients, -1)
    assert (grad[..., vocab:] == 0).all()
    values = {name: value for name, value in results._asdict().items() if value is not None}
    actual = {name: value.cpu() for name, value in {**values, "grad": grad}.items()}
    assert_matches(actual, expected_loss(logits, labels, "idft", vocab, upstream))
    again = triton_backend.token_results(states.clone(), placed, objective, vocab, cross_entropy_values=False)
    assert all(torch.equal(first, second) for first, second in zip(results[:4], again[:4], strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("floor,exempt", [(0.0, (3,)), (0.3, (3, 7, 0))])
def test_the_kernels_formulas_are_the_objectives(
    triton_engine: Engine, objective: str, floor: float, exempt: tuple[int, ...]
) -> None:
    logits, labels = make_inputs((16,), 10)
    in_kernel = objective_of(objective).with_exempt_tokens(exempt)
    if not in_kernel.negative_weights:
        in_kernel = in_kernel.with_weight_floor(floor)
    in_torch = replace(in_kernel, name="in torch", token_weight=in_kernel.token_weight.function)
    torch.testing.assert_close(
        triton_engine.run(logits, labels, in_kernel)["weight"],
        triton_engine.run(logits, labels, in_torch)["weight"],
        rtol=2e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("parameters", [(0.25, 0.5, 1.5, 0.3), (4.0, 0.0, 0.9, 0.8), (1.0, 1.0, 1.0, 1.0)])
@pytest.mark.parametrize("on_device", [False, True])
def test_every_parameter_of_idft_reaches_the_kernel(
    triton_engine: Engine, parameters: tuple[float, float, float, float], on_device: bool
) -> None:
    logits, labels = make_inputs((16,), 10)
    beta, gamma_min, gamma_max, value = parameters
    gamma_lambda = triton_engine.place(torch.tensor(value)) if on_device else value
    objective = idft(beta, gamma_min, gamma_max, gamma_lambda)
    expected = expected_loss(logits, labels, "ce")
    gamma = ((expected.log_prob + expected.entropy) / -beta).exp().clamp(gamma_min, gamma_max)
    weight = ((1 + value * (gamma - 1)) * expected.log_prob).exp()
    actual = triton_engine.run(logits, labels, objective)["weight"]
    torch.testing.assert_close(actual, torch.where(labels < 0, 0, weight).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 10.0, 100.0])
def test_the_exponent_of_power_reaches_the_kernel(triton_engine: Engine, q: float) -> None:
    logits, labels = make_inputs((16,), 10)
    expected = (q * expected_loss(logits, labels, "ce").log_prob).exp()
    actual = triton_engine.run(logits, labels, resolve_objective("power", q=q))["weight"]
    # 100 exponents of 10 nats: exp amplifies the rounding of its argument.
    torch.testing.assert_close(actual, torch.where(labels < 0, 0, expected).float(), rtol=1e-4, atol=1e-7)
    for same, name in ((0.0, "ce"), (1.0, "dft")):
        if q == same:
            assert torch.equal(actual, triton_engine.run(logits, labels, name)["weight"])


class Launches:
    """Counts the launches of each kernel, and lets them happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = dict.fromkeys(["shard_state_kernel", "token_results_kernel", "gradient_kernel"], 0)
        for name in self.counts:
            monkeypatch.setattr(triton_kernels, name, _Counted(self.counts, name, getattr(triton_kernels, name)))


class _Counted:
    def __init__(self, counts: dict[str, int], name: str, kernel) -> None:  # type: ignore[no-untyped-def]
        self.counts, self.name, self.kernel = counts, name, kernel

    def __getitem__(self, grid):  # type: ignore[no-untyped-def]
        self.counts[self.name] += 1
        return self.kernel[grid]


LAYOUTS = {
    "flat": lambda: (torch.randn(6, 20), torch.zeros(6).long(), 1),
    "Megatron's [s, b, V] with labels from [b, s]": lambda: (torch.randn(4, 3, 20), torch.zeros(3, 4).long().t(), 1),
    "transposed logits": lambda: (torch.randn(4, 3, 20).transpose(0, 1), torch.zeros(3, 4).long(), 1),
    "one token": lambda: (torch.randn(20), torch.tensor(0), 1),
    "no token": lambda: (torch.randn(0, 3, 20), torch.zeros(0, 3).long(), 0),
    "three strides": lambda: (torch.randn(2, 3, 2, 20).permute(2, 1, 0, 3), torch.zeros(2, 3, 2).long(), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(triton_engine: Engine, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, expected = LAYOUTS[layout]()
    launches = Launches(monkeypatch)
    leaf = triton_engine.place(logits).requires_grad_()
    triton_engine.loss(leaf, triton_engine.place(labels)).loss.sum().backward()
    assert launches.counts == {
        "shard_state_kernel": expected,
        "token_results_kernel": min(expected, 1),
        "gradient_kernel": expected,
    }


def test_no_tensor_has_the_size_of_the_logits(triton_engine: Engine) -> None:
    leaf = triton_engine.place(torch.randn(4, 3, 90).bfloat16()).requires_grad_()
    logits, labels = as_intermediate(leaf), triton_engine.place(torch.zeros(4, 3).long())
    with LargestTensor(logits) as largest:
        loss = triton_engine.loss(logits, labels, vocab_size=40, overwrite_logits=True).loss.sum()
        torch.autograd.grad(loss, logits)
    assert largest.elements.get(torch.bfloat16, 0) == 0
    largest_bytes = max(dtype.itemsize * elements for dtype, elements in largest.elements.items())
    assert largest_bytes <= 16 * labels.numel() < logits.nbytes / 4  # the state


@pytest.mark.parametrize("dtype,vocab", [(torch.float32, 70_001), (torch.float16, 70_001), (torch.bfloat16, 300_000)])
def test_the_widest_rows(triton_engine: Engine, dtype: torch.dtype, vocab: int) -> None:
    logits, labels = make_inputs((2,), vocab, dtype)
    labels[0] = 70_000
    assert_matches(triton_engine.run(logits, labels), expected_loss(logits, labels, "idft"))


# Offsets beyond 2^31 elements, in rows and in columns; on a CPU only the pages that are touched exist.
@pytest.mark.parametrize("shape,stride", [((2, 100), (2**31 + 64, 1)), ((2, 40), (1, 2**26))])
def test_offsets_beyond_2_to_the_31(triton_engine: Engine, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    assert size > 2**31
    values, labels = torch.randn(shape).bfloat16(), torch.tensor([3, 30])
    logits = torch.empty(size, dtype=torch.bfloat16).as_strided(shape, stride).copy_(values)
    assert_matches(triton_engine.run(logits, labels), expected_loss(values, labels, "idft"))


READS = """
import ctypes, mmap, os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from megatron_idft import dft, vocab_parallel_loss

def protect(row):
    assert libc.mprotect(ctypes.c_void_p(base + 4096 * row), 4096, 0) == 0

memory = mmap.mmap(-1, 4 * 4096)
logits = torch.frombuffer(memory, dtype=torch.float32).view(4, 1024)  # a page for each row
base, libc = logits.data_ptr(), ctypes.CDLL(None, use_errno=True)
assert base % 4096 == 0
logits.normal_()
logits[1, 7] = -float("inf")  # its target has probability 0, so DFT gives it weight 0
labels = torch.tensor([5, 7, -100, 6])
protect(2)
out = vocab_parallel_loss(logits.requires_grad_(), labels, "dft", backend="triton")
assert out.weight.gt(0).tolist() == [True, False, False, True]
for unreadable in (0, 1, 3):
    pid = os.fork()
    if pid == 0:
        protect(unreadable)
        (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
        assert gradient.ne(0).any(-1).tolist() == [True, False, False, True]
        os._exit(0)
    print(unreadable, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_rows_without_gradient_are_not_read() -> None:
    # Row 2 is ignored and unreadable from the start, row 1 has weight 0 and is unreadable in backward. The others are
    # read, which kills the process.
    child = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True)
    killed = -11  # SIGSEGV
    assert child.stdout.split() == ["0", str(killed), "1", "0", "3", str(killed)], child.stderr


@interpreted
def test_columns_beyond_the_row_are_not_read() -> None:
    # 1000 columns, the last of which ends at an unreadable page.
    memory = mmap.mmap(-1, 2 * 4096)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    protection = ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.data_ptr() + 4096), 4096, 0)
    assert protection == 0
    logits = whole[24:1024].view(1, 1000).normal_()
    vocab_parallel_loss(logits, torch.tensor([3]), vocab_size=999, backend="triton")


@pytest.mark.gpu
def test_no_host_synchronisation_and_cuda_graph() -> None:
    logits = torch.randn(64, 2, 4096, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(-1, 4000, (2, 64), device="cuda").t()
    gamma_lambda = torch.ones((), device="cuda")
    objective = idft(gamma_lambda=gamma_lambda).with_weight_floor(0.1).with_exempt_tokens([2])

    def step() -> tuple[Tensor, Tensor]:
        work = as_intermediate(logits.detach().requires_grad_())
        loss = vocab_parallel_loss(work, labels, objective, vocab_size=4000, overwrite_logits=True).loss
        return loss, torch.autograd.grad(loss.sum(), work)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1.0, 0.25):
        gamma_lambda.fill_(value)
        logits.normal_()
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_peak_memory() -> None:
    leaf = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 8192, (4096,), device="cuda")
    logits = as_intermediate(leaf)
    loss = vocab_parallel_loss(logits[:8] * 1, labels[:8], overwrite_logits=True).loss.sum()
    loss.backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = vocab_parallel_loss(logits, labels, overwrite_logits=True).loss.sum()
    torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before < 0.02 * logits.nbytes


def peer(package: str) -> Path:
    """The folder of an installed package, or of the copy that tests/run.sh keeps; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    folder = PEERS / package
    assert folder.is_dir(), f"{package} is neither installed nor in {PEERS}: run `bash tests/run.sh` once"
    return folder


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def transformer_engine_kernels() -> ModuleType:
    # Its package wants a compiled extension; the kernels are one file without any.
    return load("te_cross_entropy", peer("transformer_engine") / "common" / "triton" / "cross_entropy.py")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [97, 5003])
def test_cross_entropy_of_transformer_engine(
    triton_engine: Engine, transformer_engine_kernels: ModuleType, vocab: int, dtype: torch.dtype
) -> None:
    logits, labels = make_inputs((3, 2), vocab, dtype)
    ours = triton_engine.run(logits, labels, "ce")
    theirs, targets = triton_engine.place(logits.clone()), triton_engine.place(labels)
    loss, stats = torch.empty_like(targets, dtype=torch.float32), theirs.new_empty(6, 2, dtype=torch.float32)
    count, upstream = torch.zeros_like(targets[0, 0]), torch.ones_like(loss)
    settings = {"label_smoothing": 0.0, "BLOCK_SIZE": 1024}
    transformer_engine_kernels.cross_entropy_forward_kernel[(6,)](
        theirs, *theirs.stride(), theirs, targets, loss, stats, count, vocab, 2, -100,
        COUNT_NON_IGNORE=False, COPY_INPUT=False, **settings,
    )  # fmt: skip
    transformer_engine_kernels.cross_entropy_backward_kernel[(6,)](
        theirs, targets, stats, count, upstream, 1, 0, 1, vocab, -100, reduce_loss=False, **settings
    )
    torch.testing.assert_close(ours["loss"], loss.cpu(), rtol=1e-6, atol=1e-6)
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # theirs truncates, interpreted
    torch.testing.assert_close(ours["grad"], theirs.cpu(), rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_liger(triton_engine: Engine, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(peer("liger_kernel").parent))
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits, labels = make_inputs((6,), 3001, dtype)
    ours = triton_engine.run(logits, labels, "ce")
    leaf = triton_engine.place(logits.clone()).requires_grad_()
    loss = LigerCrossEntropyFunction.apply(
        as_intermediate(leaf), triton_engine.place(labels), None, -100, 0.0, 0.0, "none", None, False
    )[0]
    loss.backward(torch.ones_like(loss))
    assert leaf.grad is not None
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]  # theirs has the logits' dtype
    torch.testing.assert_close(ours["loss"], loss.detach().float().cpu(), rtol=ulp, atol=2e-6)
    torch.testing.assert_close(ours["grad"], leaf.grad.cpu(), rtol=ulp, atol=1e-6)

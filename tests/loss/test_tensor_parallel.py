"""The loss over real gloo ranks. Each rank runs all cases of its world size; the parent judges what comes back."""

import math
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idft import resolve_objective, vocab_parallel_loss
from tests.loss.engines import interpreted
from tests.loss.intermediate import as_intermediate, bits
from tests.loss.oracle import assert_matches, expected_loss, objective_of, reference_of
from tests.ranks import run_ranks

TP_SIZES = [1, 2, 4]
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]  # on CPUs; compiled, see test_triton.py

# name: (leading shape, padded vocabulary, true vocabulary, dtype, objective)
CASES: dict[str, tuple[tuple[int, ...], int, int, torch.dtype, str]] = {
    "no padding": ((5,), 48, 48, torch.float32, "idft"),
    "Megatron's [s, b, V/tp]": ((3, 2), 48, 48, torch.float32, "idft"),
    "a few padding columns on the last rank": ((5,), 48, 43, torch.float32, "entropy"),
    "the last ranks hold padding only": ((5,), 48, 11, torch.float32, "idft"),  # 12 columns per rank at TP 4
    "one valid column on a rank": ((5,), 48, 37, torch.float32, "dft"),
    "bf16": ((3, 2), 1000, 990, torch.bfloat16, "idft"),
    "a fifth number in the state": ((5,), 48, 43, torch.float32, "deft"),
    "bf16, a fifth number": ((3, 2), 1000, 990, torch.bfloat16, "deft"),
    "negative weights from a reference": ((3, 2), 48, 43, torch.float32, "asft"),
    "bf16, two numbers of a reference": ((3, 2), 1000, 990, torch.bfloat16, "idft of the reference"),
    "fp16": ((3, 2), 1000, 990, torch.float16, "dft"),
    "one column per rank": ((5,), 4, 4, torch.float32, "ce"),  # V/tp = 1 at TP 4
    "one token": ((1,), 16, 16, torch.float32, "idft"),
    "no token": ((0, 2), 16, 16, torch.float32, "idft"),
}


def make_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits, labels and upstream gradient, the same in every process."""
    shape, padded, vocab, dtype, _ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(*shape, padded, generator=generator) * 3
    logits[..., vocab:] = 40.0  # padding that would win every maximum
    labels = torch.randint(-1, vocab, shape, generator=generator)
    return logits.to(dtype), labels, torch.randn(shape, generator=generator)


def make_extremes() -> tuple[Tensor, Tensor]:
    """Rows whose shards differ wildly: a shard of -inf only, weight on one shard only, poison at ignored positions."""
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    logits[0, :8] = -math.inf
    logits[1, 4:] = -math.inf
    logits[2, 12:] += 1e4
    logits[3] -= 1e4
    logits[4] = 2.0
    logits[5, 0] = math.nan
    logits[6] = math.inf
    logits[7, 4:8] = -1e4
    return logits, torch.tensor([9, 2, 13, 5, 15, -100, -1, 0])


class Collectives(TorchDispatchMode):
    """Names and input sizes of all collectives that reach a process group, whichever Python function started them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "c10d" in func.namespace:
            sent = args[1] if isinstance(args[1], Tensor) else args[0][0]
            self.calls.append((func._schema.name, sent.numel(), sent.dtype))
        return func(*args, **(kwargs or {}))


def run_shard(
    logits: Tensor, labels: Tensor, upstream: Tensor, objective: str, vocab_size: int, backend: str
) -> dict[str, Any]:
    settings = {"tp_group": torch.distributed.group.WORLD, "vocab_size": vocab_size, "backend": backend}
    resolved = objective_of(objective)
    settings["reference"] = reference_of(labels)
    shard = logits.chunk(torch.distributed.get_world_size(), dim=-1)[torch.distributed.get_rank()]
    shard = shard.detach().requires_grad_()  # a strided view of the full logits
    with Collectives() as forward:
        out = vocab_parallel_loss(shard, labels, resolved, **settings)
    with Collectives() as backward:
        out.loss.backward(upstream)
    result = {name: value.detach() for name, value in out._asdict().items() if value is not None}
    logits = as_intermediate(shard)
    again = vocab_parallel_loss(logits, labels, resolved, overwrite_logits=True, **settings)
    (overwriting,) = torch.autograd.grad(again.loss, logits, upstream)
    assert overwriting.data_ptr() == logits.data_ptr()
    assert shard.grad is not None and torch.equal(bits(overwriting), bits(shard.grad))
    assert all(torch.equal(bits(value), bits(again._asdict()[name])) for name, value in result.items())
    return {**result, "grad": shard.grad, "forward": forward.calls, "backward": backward.calls}


def run_all_cases(backend: str) -> dict[str, Any]:
    results = {}
    for name, (_, _, vocab, _, objective) in CASES.items():
        results[name] = run_shard(*make_case(name), objective, vocab, backend)
    logits, labels = make_extremes()
    for objective in ("ce", "idft"):
        results[f"extremes {objective}"] = run_shard(logits, labels, torch.ones(8), objective, 16, backend)
    try:
        vocab_parallel_loss(torch.randn(2, 8), torch.tensor([0, 10**6]), tp_group=torch.distributed.group.WORLD)
    except ValueError as error:
        results["invalid label"] = str(error)
    return results


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=TP_SIZES)
def ranks(request: pytest.FixtureRequest, backend: str) -> list[dict[str, Any]]:
    return run_ranks(run_all_cases, request.param, backend)


def joined(ranks: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    """Rank 0's outputs with the whole gradient."""
    return {**ranks[0][name], "grad": torch.cat([rank[name]["grad"] for rank in ranks], dim=-1)}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient(ranks: list[dict[str, Any]], name: str) -> None:
    logits, labels, upstream = make_case(name)
    _, _, vocab, dtype, objective = CASES[name]
    actual = joined(ranks, name)
    assert actual["grad"].dtype == dtype
    assert (actual["grad"][..., vocab:] == 0).all()
    assert_matches(actual, expected_loss(logits, labels, objective, vocab, upstream))


@pytest.mark.parametrize("objective", ["ce", "idft"])
def test_extreme_shards(ranks: list[dict[str, Any]], objective: str) -> None:
    logits, labels = make_extremes()
    actual = joined(ranks, f"extremes {objective}")
    assert_matches(actual, expected_loss(logits, labels, objective))
    assert (actual["grad"][5:7] == 0).all() and (actual["loss"][5:7] == 0).all()


@pytest.mark.parametrize("name", [*CASES, "extremes ce", "extremes idft"])
def test_every_rank_has_the_same_bits(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks[1:]:
        for field in ("loss", "weight", "log_prob", "entropy", "invalid_labels"):
            assert torch.equal(rank[name][field], ranks[0][name][field]), field


@pytest.mark.parametrize("name", CASES)
def test_one_collective_of_16_bytes_per_token_and_4_more_for_deft(ranks: list[dict[str, Any]], name: str) -> None:
    tokens, numbers = math.prod(CASES[name][0]), 5 if CASES[name][-1] == "deft" else 4
    expected = [("c10d::_allgather_base_", numbers * tokens, torch.float32)] if len(ranks) > 1 and tokens else []
    for rank in ranks:
        assert rank[name]["forward"] == expected
        assert rank[name]["backward"] == []


def test_an_invalid_label_stops_every_rank_before_a_collective(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "1 of 2 labels" in rank["invalid label"]


def test_collectives_are_seen() -> None:
    # The counter itself must be able to fail.
    assert run_ranks(count_two_collectives, 2) == [["c10d::allreduce_", "c10d::broadcast_"]] * 2


def count_two_collectives() -> list[str]:
    with Collectives() as collectives:
        torch.distributed.all_reduce(torch.ones(1))
        torch.distributed.broadcast(torch.ones(1), 0)
    return [name for name, *_ in collectives.calls]


def call_with_a_group_of_rank_0() -> str:
    group = torch.distributed.new_group([0])
    try:
        vocab_parallel_loss(torch.randn(2, 8), torch.tensor([0, 1]), tp_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_rank_outside_the_group_is_told() -> None:
    inside, outside = run_ranks(call_with_a_group_of_rank_0, 2)
    assert inside == "no error" and "not a member of tp_group" in outside


def train_steps(vocab: int, steps: int) -> list[float]:
    """Gradient descent on a sharded table of logits; every rank updates its own columns."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(10, vocab, generator=generator).chunk(size, -1)[rank].clone().requires_grad_()
    labels = torch.randint(0, vocab, (10,), generator=generator)
    losses = []
    for step in range(steps):
        objective = resolve_objective("idft", gamma_lambda=step / steps)
        out = vocab_parallel_loss(table, labels, objective, tp_group=torch.distributed.group.WORLD)
        (grad,) = torch.autograd.grad(out.loss.mean(), table)
        with torch.no_grad():
            table -= 20 * grad
        losses.append(-out.log_prob.mean().item())
    return losses


def test_training_does_not_depend_on_the_layout() -> None:
    single = run_ranks(train_steps, 1, 24, 20)[0]
    assert single[-1] < 0.6 * single[0]  # it does learn
    for size in (2, 4):
        for losses in run_ranks(train_steps, size, 24, 20):
            assert losses == pytest.approx(single, rel=1e-5)


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("rank 1 has had enough")
    torch.distributed.barrier()


def test_run_ranks_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        run_ranks(fail_on_rank_1, 2)


def wait_forever() -> None:
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()
    else:
        import time

        time.sleep(60)


def test_run_ranks_gives_up_after_its_timeout() -> None:
    with pytest.raises(AssertionError):
        run_ranks(wait_forever, 2, timeout=2.0)

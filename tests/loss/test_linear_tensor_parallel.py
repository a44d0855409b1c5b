"""The fused output head over real gloo ranks: tensor parallelism, sequence parallelism, and what they exchange."""

from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from megatron_idft import vocab_parallel_linear_loss
from megatron_idft.loss.linear import passes
from tests.loss.engines import interpreted
from tests.loss.linear_cases import LinearCase, assert_close, expected_linear, make_linear_case
from tests.loss.oracle import objective_of, reads_reference, reference_of
from tests.loss.test_tensor_parallel import Collectives
from tests.ranks import run_ranks

BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
CHUNK, BLOCK = 5, 2
# name: (dtype, objective, sequence parallel, gradients in forward, compacted, true vocabulary of 48)
CASES: dict[str, tuple[torch.dtype, str, bool, bool, bool, int]] = {
    "fp32": (torch.float32, "idft", False, True, False, 43),
    "fp32, trained tokens only": (torch.float32, "idft", False, True, True, 43),
    "bf16, sequence parallel": (torch.bfloat16, "idft", True, True, False, 43),
    "sequence parallel, trained tokens only": (torch.float32, "deft", True, True, True, 43),
    "sequence parallel, logits computed twice": (torch.float32, "asft", True, False, True, 43),
    "bf16, logits computed twice": (torch.bfloat16, "ce", False, False, False, 43),
    "the last ranks hold padding only": (torch.float32, "dft", True, True, True, 11),
}


def make(name: str) -> LinearCase:
    dtype, *_, vocab = CASES[name]
    return make_linear_case((8, 2), 16, 48, vocab, dtype, bias=True, logit_scale=0.5, seed=len(name))


def run_case(name: str, backend: str) -> dict[str, Any]:
    _, objective, sequence_parallel, in_forward, compacted, _ = CASES[name]
    case, group = make(name), torch.distributed.group.WORLD
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    hidden, weight, bias = case.leaves()
    if sequence_parallel:
        hidden = hidden.detach().chunk(size)[rank].requires_grad_()
    weight, bias = (value.detach().chunk(size)[rank].clone().requires_grad_() for value in (weight, bias))
    with Collectives() as forward:
        out = vocab_parallel_linear_loss(
            hidden,
            weight,
            case.labels,
            objective_of(objective),
            group,
            backend=backend,
            bias=bias,
            sequence_parallel=sequence_parallel,
            num_trained=case.num_trained if compacted else None,
            chunk_tokens=CHUNK,
            gradients_in_forward=in_forward,
            reference=reference_of(case.labels) if reads_reference(objective) else None,
            **case.settings(),
        )
    with Collectives() as backward:
        (out.loss * case.loss_mask).sum().backward()
    return {
        **{field: value.detach() for field, value in out._asdict().items() if value is not None},
        "hidden": hidden.grad,
        "weight rows": weight.grad,
        "bias rows": bias.grad,
        "forward": forward.calls,
        "backward": backward.calls,
    }


def run_cases(backend: str) -> dict[str, dict[str, Any]]:
    passes.block_tokens = lambda chunk_tokens, columns: BLOCK  # in this process: several blocks of a few tokens
    return {name: run_case(name, backend) for name in CASES}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, backend: str) -> list[dict[str, Any]]:
    return run_ranks(run_cases, request.param, backend)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, ranks: list[dict[str, Any]]) -> None:
    case, found = make(name), [rank[name] for rank in ranks]
    dtype, objective, sequence_parallel, *_ = CASES[name]
    expected = expected_linear(case, objective, case.loss_mask)
    for field in ("loss", "weight", "log_prob", "entropy"):
        assert all(torch.equal(rank[field], found[0][field]) for rank in found), "the same bits on every rank"
        torch.testing.assert_close(found[0][field].double(), getattr(expected.values, field), rtol=2e-5, atol=2e-5)
    hidden: list[Tensor] = [rank["hidden"] for rank in found]
    if not sequence_parallel:
        assert all(torch.equal(each, hidden[0]) for each in hidden)
    whole = torch.cat(hidden) if sequence_parallel else hidden[0]
    assert_close("hidden", whole, expected.hidden, dtype)
    assert_close("weight", torch.cat([rank["weight rows"] for rank in found]), expected.weight, dtype)
    assert expected.bias is not None
    assert_close("bias", torch.cat([rank["bias rows"] for rank in found]), expected.bias, dtype)


@pytest.mark.parametrize("name", CASES)
def test_collectives(name: str, ranks: list[dict[str, Any]]) -> None:
    """One all-gather of a few numbers per token for each block, and the hidden states' gradient summed once."""
    case, size = make(name), len(ranks)
    dtype, objective, sequence_parallel, in_forward, compacted, _ = CASES[name]
    tokens = case.num_trained if compacted else case.labels.numel()
    numbers = 4 + len(objective_of(objective).extra_statistics)
    gathered = ("c10d::_allgather_base_", case.hidden.numel() // size, dtype)
    states = [("c10d::_allgather_base_", numbers * block, torch.float32) for block in blocks(tokens)]
    summed = ("c10d::allreduce_", tokens * 16, dtype)
    if sequence_parallel:
        summed = ("c10d::_reduce_scatter_base_", case.hidden.numel(), dtype)
    forward, backward = [gathered] * sequence_parallel + states, [gathered] * sequence_parallel + [summed]
    if in_forward:
        forward, backward = [*forward, summed], []
    for rank in ranks:
        assert (rank[name]["forward"], rank[name]["backward"]) == ((forward, backward) if size > 1 else ([], []))


def blocks(tokens: int) -> list[int]:
    chunks = [min(CHUNK, tokens - begin) for begin in range(0, tokens, CHUNK)]
    return [min(BLOCK, chunk - begin) for chunk in chunks for begin in range(0, chunk, BLOCK)]

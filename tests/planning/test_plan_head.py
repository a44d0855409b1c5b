"""The memory of the fused output head, as `plan` counts it and as the head allocates it."""

import itertools
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_idft import vocab_parallel_linear_loss
from megatron_idft.loss.linear import tokens as head_tokens
from megatron_idft.planning.head import fused_tokens, head
from megatron_idft.planning.shape import Batch, Implementation, Layout, Precision, Training
from tests.launch import ROOT
from tests.planning.test_plan_arithmetic import GPT
from tests.ranks import run_ranks

sys.path.append(str(ROOT / "tools" / "benchmarks"))
from memory_probe import StorageCounter, all_storages

TOKENS, HIDDEN, VOCAB = 4096, 64, 16384
SMALL = TOKENS * 64  # labels, statistics


def test_chunks_and_blocks_are_those_of_the_head():
    asked = (0, 100, 1000, 4096)
    sizes = (1, 127, 300, 2048, 8192, 8193, 100_000)
    for size, columns, chunk, device in itertools.product(sizes, (300, 4096, 151_936), asked, ("cpu", "cuda")):
        own = head_tokens.even_chunk(size, chunk) if chunk else head_tokens.default_chunk_tokens(size, device)
        found = fused_tokens(size, columns, device == "cpu", chunk)
        assert found == (own, min(head_tokens.block_tokens(own, columns), own)), (size, columns, chunk, device)


def allocated(dtype, at_once, tensor=1, sequence_parallel=False, untrained=0):
    """Bytes at the worst moment of the head's forward and backward pass on this rank."""
    rank, group = (torch.distributed.get_rank(), torch.distributed.group.WORLD) if tensor > 1 else (0, None)
    torch.manual_seed(rank)
    size = TOKENS // tensor if sequence_parallel else TOKENS
    hidden = torch.randn(size, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB // tensor, HIDDEN, dtype=dtype))
    if at_once:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
    labels[:untrained] = -100
    settings = {"sequence_parallel": sequence_parallel, "fuse_wgrad_accumulation": at_once}
    forward = StorageCounter(0, all_storages())
    with forward:
        out = vocab_parallel_linear_loss(
            hidden, weight, labels, "idft", group, num_trained=TOKENS - untrained, backend="reference", **settings
        )
    if group is not None:
        time.sleep(0.5)  # gloo's thread lets go of a collective's tensors a moment after its result is there
    kept, loss = forward.live, out.loss.sum()
    backward = StorageCounter(0, all_storages())
    with backward:
        loss.backward()
    return SimpleNamespace(forward=forward.peak, backward=kept + backward.peak)


def planned(dtype, at_once, tensor=1, sequence_parallel=False):
    implementation = Implementation(
        head="fused",
        cpu=True,
        loss="reference",
        loss_block_bytes=max(2**23, 2**20 * torch.get_num_threads()),
    )
    return head(
        Training(
            replace(GPT, hidden=HIDDEN, vocab=VOCAB),
            Layout(gpus=tensor, tensor=tensor, sequence_parallel=sequence_parallel),
            Batch(TOKENS, 1, 1),
            Precision(weight=dtype.itemsize, gradient=4 if at_once else 2),
            implementation=implementation,
        )
    )


@pytest.mark.parametrize("untrained", [0, 1])
@pytest.mark.parametrize(("dtype", "at_once"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_the_head_allocates_what_is_counted(dtype, at_once, untrained):
    found, counted = allocated(dtype, at_once, untrained=untrained), planned(dtype, at_once)
    assert counted.logits == pytest.approx(found.forward, rel=0.02, abs=SMALL)
    assert counted.after == pytest.approx(found.backward, rel=0.02, abs=SMALL)
    logits = TOKENS * VOCAB * dtype.itemsize
    assert found.forward < logits / 3


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_each_of_two_ranks_allocates_what_is_counted(sequence_parallel):
    case = torch.bfloat16, True, 2, sequence_parallel
    counted = planned(*case)
    for found in run_ranks(allocated, 2, *case):
        assert counted.logits == pytest.approx(found.forward, rel=0.02, abs=SMALL)
        assert counted.after == pytest.approx(found.backward, rel=0.02, abs=SMALL)

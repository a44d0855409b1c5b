"""A micro-batch of training, from its sample to the gradient of its logits, as a CUDA graph would capture it.

On fake tensors: everything that asks the host for a value, or copies one from there, raises. Launches of kernels are
noted and not made. The backward pass is looked at on the CPU's fake tensors, for autograd asks CUDA's driver.
"""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from megatron.core import mpu
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from megatron_idft import idft
from megatron_idft.data.packed.dataset import PackLimits
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.integration.loss.hook import LossHook
from megatron_idft.integration.loss.metrics import LossMetrics
from megatron_idft.integration.training import batches
from megatron_idft.loss import triton_backend
from tests.captured import HostNeededError, captured

SEQ, VOCAB, PADDED, LIMITS = 32, 500, 512, PackLimits(most_documents=6, longest_document=20)
COLUMNS = ReferenceColumns(entropy=True, top_k=2)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KERNELS = ["shard_state_kernel", "token_results_kernel", "gradient_kernel"]


class Kernel:
    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda **_: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    kernels = {name: Kernel(name, names) for name in KERNELS}
    monkeypatch.setattr(triton_backend, "kernels", SimpleNamespace(INTERPRETED=False, **kernels))
    return names


@pytest.fixture
def args(monkeypatch):
    """Megatron's arguments, with which the batches are made; one rank."""
    found = Namespace(
        seq_length=SEQ,
        transformer_impl="transformer_engine",
        hybrid_layer_pattern=None,
        context_parallel_size=1,
        mtp_num_layers=None,
        position_embedding_type="rope",
        apply_rope_fusion=True,
        check_for_nan_in_loss_and_grad=False,  # asserted by Megatron for graphs of whole iterations
    )
    monkeypatch.setattr("megatron.training.get_args", lambda: found)
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(batches, "stage_reads", lambda *_: (True, True))
    return found


class Model(torch.nn.Module):
    """What the hook meets of a Megatron model."""

    def __init__(self, device):
        super().__init__()
        self.output_layer = torch.nn.Linear(8, PADDED, bias=False, dtype=torch.bfloat16, device=device)
        self.output_layer.output_size_per_partition = PADDED
        self.pg_collection = SimpleNamespace(tp=None)

    def compute_language_model_loss(self, labels, logits):
        raise AssertionError("the hook stands here")

    def forward(self, labels, loss_mask):
        hidden = torch.ones(labels.shape[1], labels.shape[0], 8, dtype=torch.bfloat16, device=labels.device)
        return self.compute_language_model_loss(labels, self.output_layer(hidden))


def get_batch(device):
    """From the static buffers that Megatron's graphs of whole iterations read."""
    sample = {name: torch.zeros(1, SEQ, dtype=dtype, device=device) for name, dtype in batches._DTYPES.items()}
    sample["bounds"] = torch.zeros(1, LIMITS.num_bounds(SEQ), dtype=torch.int32, device=device)
    for key in ("reference_top_ids", "reference_top_log_prob"):
        sample[key] = sample[key][..., None].expand(1, SEQ, COLUMNS.top_k)
    return batches.get_batch(iter([sample]), None, 1, limits=LIMITS, sources=True, reference=COLUMNS)


def state(device):
    """What lives from one micro-batch to the next: model, metrics and the schedule's lambda."""
    metrics = LossMetrics(device, (5, 7), gamma_limits=(0.1, 2.0), vocab_size=VOCAB, sources=("a", "b"))
    return Model(device), metrics, torch.ones((), device=device)


@pytest.mark.parametrize(("device", "training"), [(CUDA, True), (CUDA, False), (CPU, True)])
def test_a_micro_batch_asks_nothing_of_the_host(monkeypatch, launched, args, device, training):
    if device is CPU:
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, **_: tensor)
        monkeypatch.setattr("megatron_idft.loss.reject_invalid_labels", lambda *_: None)  # on the CPU only
    with captured(monkeypatch, before=lambda: state(device)) as (model, metrics, gamma_lambda):
        hook = LossHook(model.train(training), idft(gamma_lambda=gamma_lambda), VOCAB, "triton", metrics, metrics)
        hook.attach()
        metrics.begin_step()
        batch = get_batch(device)
        hook.token_sources = batch["sources"]
        output = model(batch["labels"], batch["loss_mask"])
        loss, tokens, _ = batches.loss_func(batch["loss_mask"], output)
        if device is CPU:
            (loss / tokens).backward()
        metrics.commit_step()
        made = batch["packed_seq_params"]
        assert output.shape == (1, SEQ) and made.cu_seqlens_q.shape == (9,) and made.max_seqlen_q == 20
    assert launched == (KERNELS if device is CPU else KERNELS[:2])


def test_what_a_graph_cannot_capture_is_noticed(monkeypatch, args):
    """The test above can fail: Megatron's layers that loop over documents need their number, losses their values."""
    args.apply_rope_fusion = False
    with captured(monkeypatch), pytest.raises(DynamicOutputShapeException):
        get_batch(CUDA)
    with captured(monkeypatch), pytest.raises(HostNeededError):
        torch.tensor([1.0, 2.0, 3.0], device=CUDA)
    with captured(monkeypatch), pytest.raises(HostNeededError):
        torch.ones(3, device=CUDA).cpu()
    with captured(monkeypatch), pytest.raises(DataDependentOutputException):
        torch.ones(3, device=CUDA).sum().item()

"""What a reference model said of the labels, and how many of them are trained, on the way from the samples to the hook:
every rank gets its own part."""

from argparse import Namespace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_idft.data.packed.dataset import PackLimits
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.training import batches, reference
from megatron_idft.integration.training.trained_tokens import trained_token_counter
from tests.ranks import run_ranks

SEQ, COLUMNS = 16, ReferenceColumns(entropy=True, top_k=3)
BOUNDS = [0, 4, 12, 16, 16, 16]  # documents of 4 and 8 positions, and padding
OURS = ("sources", "reference_log_prob", "reference_entropy", "reference_top_ids", "reference_top_log_prob")


def sample():
    """Two rows, in which every number tells its place: position p of row r is 100 r + p, and of top k, 1000 k more.

    Every third is trained, with a weight that may be negative.
    """
    places = torch.arange(SEQ) + 100 * torch.arange(2)[:, None]
    tops = places[..., None] + 1000 * torch.arange(COLUMNS.top_k)
    found = {key: places.clone() for key in ("tokens", "position_ids", "labels", "sources")}
    found |= {key: places.float() for key in ("reference_log_prob", "reference_entropy")}
    found["loss_mask"] = torch.where(places % 3 == 0, 50.5 - places, 0)
    return found | {"reference_top_ids": tops.int(), "reference_top_log_prob": tops.float()}


def batch_of_this_rank(axis, packs, reads):
    """In a process of its own, whose world is the group of tensor ("tp") or of context parallelism ("cp")."""
    import megatron.core.utils
    from megatron.core import mpu

    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    tp, cp = (2, 1) if axis == "tp" else (1, 2)
    args = Namespace(seq_length=SEQ, context_parallel_size=cp, transformer_impl="transformer_engine")
    args = Namespace(**vars(args), hybrid_layer_pattern=None, mtp_num_layers=None, position_embedding_type="none")
    args.sft_loss_head, args.cuda_graph_impl, args.use_gloo_process_groups = "fused", "none", True
    args.distributed_timeout_minutes = 1
    mpu.get_tensor_model_parallel_rank = lambda: rank if axis == "tp" else 0
    mpu.get_tensor_model_parallel_world_size = lambda: tp
    mpu.get_tensor_model_parallel_src_rank = lambda: 0
    mpu.get_tensor_model_parallel_group = mpu.get_context_parallel_group = lambda: world
    mpu.get_context_parallel_rank, mpu.get_context_parallel_world_size = lambda: rank if cp > 1 else 0, lambda: cp
    torch.Tensor.cuda = lambda tensor, **_: tensor
    torch.cuda.current_device = lambda: "cpu"
    batches.stage_reads = lambda *_: reads
    import megatron.training

    megatron.training.get_args = lambda: args
    # Transformer Engine's places of a rank: of each document in 2 c parts the first and last that are its own.
    ends = pairwise(BOUNDS)
    parts = [torch.arange(begin, end).chunk(4) for begin, end in ends if end > begin]
    indices = torch.cat([torch.cat([part[rank], part[3 - rank]]) for part in parts])
    megatron.core.utils.tex = SimpleNamespace(thd_get_partitioned_indices=lambda *_: indices)
    rows = sample() if axis == "cp" or rank == 0 else None
    limits = None
    if packs:
        limits = PackLimits(most_documents=3, longest_document=8)
        rows = {key: value[:1] for key, value in rows.items()}
        rows["bounds"] = torch.tensor([BOUNDS], dtype=torch.int32)
    counter, size = trained_token_counter(args), 1 if packs else 2
    told = {"limits": limits, "sources": True, "reference": COLUMNS, "count_trained": counter}
    found = batches.get_batch(iter([rows, rows]), None, size, **told)
    if counter.group is not None:
        assert counter.group is not world and torch.distributed.get_backend(counter.group) == "gloo"
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor | int)}


def test_tensor_parallel_ranks_get_them_by_broadcast():
    for batch in run_ranks(batch_of_this_rank, 2, "tp", False, (True, True)):
        assert batch["num_trained"] == 11 == (batch["loss_mask"] != 0).sum()
        for key, value in sample().items():
            assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key


@pytest.mark.parametrize(("packs", "reads"), [(False, (True, True)), (True, (True, True)), (True, (False, True))])
def test_context_parallel_ranks_get_the_places_of_their_labels(packs, reads):
    ranks = run_ranks(batch_of_this_rank, 2, "cp", packs, reads)
    assert [batch["num_trained"] for batch in ranks] == ([4, 2] if packs else [6, 5])
    for batch in ranks:
        places = batch["labels"]
        assert batch["num_trained"] == (batch["loss_mask"] != 0).sum()
        assert places.shape == ((1, 8) if packs else (2, 8))
        assert torch.equal(batch["sources"], places)
        for key in ("reference_log_prob", "reference_entropy"):
            assert torch.equal(batch[key], places.float())
        for key in ("reference_top_ids", "reference_top_log_prob"):
            assert torch.equal(batch[key].long(), places[..., None] + 1000 * torch.arange(3)), key


def test_a_stage_without_labels_gets_none():
    [batch, _] = run_ranks(batch_of_this_rank, 2, "cp", False, (True, False))
    assert set(batch) == {"tokens", "position_ids"}


def needing(monkeypatch, statistics, kl_coefficient=0.0):
    objective = SimpleNamespace(reference_statistics=frozenset(statistics), kl_coefficient=kl_coefficient or None)
    monkeypatch.setattr(reference, "build_objective", lambda args: objective)
    return Namespace(sft_loss="asft")


def test_samples_hold_what_the_objective_needs_and_no_more(monkeypatch):
    rich = {
        "a": SimpleNamespace(reference=ReferenceColumns(True, 20)),
        "b": SimpleNamespace(reference=ReferenceColumns(True, 8)),
    }
    for statistics, divergence, expected in (
        ((), 0.0, None),
        (("reference_log_prob",), 0.0, ReferenceColumns()),
        (("reference_log_prob", "reference_entropy"), 0.0, ReferenceColumns(entropy=True)),
        ((), 0.1, ReferenceColumns(top_k=8)),
    ):
        args = needing(monkeypatch, statistics, divergence)
        assert reference.sample_columns(args, rich) == expected
    assert reference.sample_columns(Namespace(sft_loss=None), {}) is None


@pytest.mark.parametrize(
    ("there", "statistics", "divergence", "flags"),
    [
        (None, ["reference_log_prob"], 0.0, "--sft-reference SCORES$"),
        (ReferenceColumns(), ["reference_entropy"], 0.0, "with --sft-reference-entropy$"),
        (ReferenceColumns(entropy=True), [], 0.1, "with --sft-reference-top-k 20$"),
        (None, ["reference_entropy"], 0.1, "SCORES --sft-reference-entropy --sft-reference-top-k 20$"),
    ],
)
def test_data_without_what_the_objective_needs_is_refused_by_name(monkeypatch, there, statistics, divergence, flags):
    args = needing(monkeypatch, statistics, divergence)
    stores = {
        "good": SimpleNamespace(reference=ReferenceColumns(True, 20)),
        "packs/poor": SimpleNamespace(reference=there),
    }
    with pytest.raises(ArgumentError, match=rf"--sft-loss asft .* packs/poor does not hold .*{flags}"):
        reference.sample_columns(args, stores)

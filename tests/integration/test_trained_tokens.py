"""The fused output head is told how many tokens of a micro-batch are trained, and what weighs their losses."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import mpu

from megatron_idft.integration.training import trained_tokens
from tests.integration.test_packed_training import MODELS, corpus, train  # noqa: F401  a fixture
from tests.te.kernels import thd_get_partitioned_indices

HERE = Path(__file__).parent
SEQ, BOUNDS = 48, [0, 8, 32, 40, 40, 48, 48]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("packs", [False, True])
def test_each_context_parallel_rank_counts_its_own_part(packs, size):
    rows = 1 if packs else 3
    mask = torch.randint(-1, 2, (rows, SEQ), generator=torch.manual_seed(7)).float()
    mask[:, 14:26] = 0  # else the ranks have about as many
    bounds = torch.tensor([BOUNDS]) if packs else None
    documents = torch.tensor(BOUNDS if packs else [0, SEQ])
    counts = [trained_tokens.trained_tokens(mask, bounds, rank, size) for rank in range(size)]
    for rank, count in enumerate(counts):
        places = thd_get_partitioned_indices(documents, SEQ, size, rank)
        assert count == (mask[:, places] != 0).sum()
    assert sum(counts) == (mask != 0).sum() and len(set(counts)) == size


def counter(monkeypatch, tensor=1, **flags):
    args = {"sft_loss_head": "fused", "cuda_graph_impl": "none", "use_gloo_process_groups": True}
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_world_size", lambda: tensor)
    monkeypatch.setattr(mpu, "get_context_parallel_rank", lambda: 0)
    monkeypatch.setattr(mpu, "get_context_parallel_world_size", lambda: 1)
    said = []
    monkeypatch.setattr(trained_tokens, "print_on_rank_0", said.append)
    return trained_tokens.trained_token_counter(Namespace(**args | flags)), said


def test_only_the_fused_head_asks_for_the_number(monkeypatch):
    found, said = counter(monkeypatch)
    assert found({"loss_mask": torch.tensor([[0, 0.5, -1], [0, 0, 2]])}) == 3 and not said
    assert counter(monkeypatch, sft_loss_head="materialized") == (None, [])


@pytest.mark.parametrize(
    ("tensor", "flags", "why"),
    [
        (1, {"cuda_graph_impl": "full_iteration"}, "a CUDA graph of whole iterations repeats"),
        (2, {"use_gloo_process_groups": False}, "drop --disable-gloo-process-groups"),
    ],
)
def test_where_the_number_cannot_be_had_a_line_says_so(monkeypatch, tensor, flags, why):
    found, [line] = counter(monkeypatch, tensor, **flags)
    assert found is None and line.startswith("> --sft-loss-head fused computes untrained tokens too: ") and why in line


def test_every_rank_is_told_of_its_micro_batches_what_the_loss_function_then_finds(corpus, tmp_path):  # noqa: F811
    """TP 2 x CP 2, in training and in evaluation, with the shares of conversations from the third step on."""
    words = f"--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --eval-interval 2 {MODELS['mlp']}"
    words += f" --tensor-model-parallel-size 2 --context-parallel-size 2 --sft-valid-data {corpus / 'others.jsonl'}"
    words += " --sft-normalization token sample@2 --sft-loss-head fused"
    script = [HERE / "counted_train.py", tmp_path]
    train(corpus, tmp_path / "run", corpus / "packs.jsonl", words, nproc=4, script=script)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3], "each two tensor-parallel ranks"
    for rows in ranks:
        assert [row["told"] for row in rows] == [row["trained"] for row in rows]
        trained = [row for row in rows if row["training"]]
        assert len(rows) > len(trained) == 16 and all(row["exact"] for row in trained)
        assert [row["factors"] for row in trained] == [False] * 8 + [True] * 8
        assert not any(row["factors"] for row in rows if not row["training"])
    counts = [[row["told"] for row in rows] for rows in (ranks[0], ranks[2])]
    assert counts[0] != counts[1] and len(set(counts[0])) > 3

"""What attention is told about a pack's documents, and the models and flags that would not listen."""

from argparse import Namespace

import pytest
import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType

from megatron_idft.errors import ArgumentError
from megatron_idft.integration.training.packed_attention import (
    check_attention,
    cumulative_lengths,
    document_mask,
    packed_sequence_parameters,
    validate_packed_arguments,
)

# Documents of 2, 3 and 1 positions and three of padding; one document that fills the sequence.
BOUNDS = torch.tensor([[0, 2, 5, 6, 9, 9, 9, 9, 9, 9], [0, *[9] * 9]], dtype=torch.int32)


def test_a_position_sees_its_own_document_up_to_itself():
    mask = document_mask(BOUNDS)
    assert mask.shape == (2, 1, 9, 9) and mask.dtype == torch.bool
    documents = ([0, 0, 1, 1, 1, 2, 3, 3, 3], [0] * 9)
    for row, document in enumerate(documents):
        for i in range(9):
            for j in range(9):
                assert bool(mask[row, 0, i, j]) != (j <= i and document[i] == document[j])


@pytest.mark.parametrize("context_parallel_size", [1, 2])
def test_packed_sequences_cover_the_row(context_parallel_size):
    lengths = cumulative_lengths(BOUNDS[0])
    assert lengths.tolist() == [0, 2, 5, 6, 9] and lengths.dtype == torch.int32
    assert cumulative_lengths(BOUNDS[1]).tolist() == [0, 9]
    made = packed_sequence_parameters(lengths, context_parallel_size)
    assert made.qkv_format == "thd" and made.max_seqlen_q == made.max_seqlen_kv == 3 and made.total_tokens == 9
    assert made.cu_seqlens_q is lengths and made.cu_seqlens_kv is lengths
    padded = lengths if context_parallel_size > 1 else None
    assert made.cu_seqlens_q_padded is padded and made.cu_seqlens_kv_padded is padded
    assert made.seq_idx.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 3]], "for Mamba layers"


def softmax(**settings):
    defaults = {"input_in_fp16": False, "input_in_bf16": True, "scaled_masked_softmax_fusion": False}
    return FusedScaleMaskSoftmax(
        **defaults | settings, attn_mask_type=AttnMaskType.causal, mask_func=None, softmax_in_fp32=True, scale=None
    )


LOCAL = Namespace(transformer_impl="local", hybrid_layer_pattern=None)


def test_attention_that_ignores_masks_is_refused():
    check_attention(LOCAL, [torch.nn.ModuleList([softmax()])])
    check_attention(LOCAL, [torch.nn.ModuleList([softmax(input_in_bf16=False, scaled_masked_softmax_fusion=True)])])
    with pytest.raises(ArgumentError, match="--no-masked-softmax-fusion"):
        check_attention(
            LOCAL, [torch.nn.Linear(1, 1), torch.nn.ModuleList([softmax(scaled_masked_softmax_fusion=True)])]
        )
    with pytest.raises(ArgumentError, match="--window-size"):
        check_attention(LOCAL, [softmax(window_size=(4, 0))])


def test_transformer_engine_takes_one_pack_per_micro_batch():
    args = Namespace(
        transformer_impl="transformer_engine", hybrid_layer_pattern=None, micro_batch_size=1, eval_micro_batch_size=None
    )
    validate_packed_arguments(args)
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        with pytest.raises(ArgumentError, match=r"one per micro-batch\. Pass --micro-batch-size 1"):
            validate_packed_arguments(Namespace(**vars(args) | {name: 2}))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
        ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl transformer_engine"),
        ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
        ({"enable_cuda_graph": True}, "--enable-cuda-graph"),
        ({"external_cuda_graph": True}, "--external-cuda-graph"),
    ],
)
def test_packed_sequences_and_cuda_graphs_are_refused_by_name(given, name):
    args = {
        "transformer_impl": "transformer_engine",
        "hybrid_layer_pattern": None,
        "micro_batch_size": 1,
        "eval_micro_batch_size": None,
        "cuda_graph_impl": "none",
    }
    validate_packed_arguments(Namespace(**args))
    wanted = f"{name} cannot be used with packs.*Drop the flag, or train on unpacked records"
    with pytest.raises(ArgumentError, match=wanted):
        validate_packed_arguments(Namespace(**args | given))

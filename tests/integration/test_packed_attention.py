"""What attention is told about a pack's documents, and the models and flags that would not listen."""

from argparse import Namespace

import pytest
import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType

from megatron_idft.errors import ArgumentError
from megatron_idft.integration.training.packed_attention import (
    check_attention,
    document_mask,
    packed_sequence_parameters,
    reads_bounds_on_host,
    validate_packed_arguments,
)

# Documents of 2, 3 and 1 positions and three of padding; one document that fills the sequence.
BOUNDS = torch.tensor([[0, 2, 5, 6, 9, 9, 9, 9, 9, 9], [0, *[9] * 9]], dtype=torch.int32)


def test_a_position_sees_its_own_document_up_to_itself():
    mask = document_mask(BOUNDS, 9)
    assert mask.shape == (2, 1, 9, 9) and mask.dtype == torch.bool
    documents = ([0, 0, 1, 1, 1, 2, 3, 3, 3], [0] * 9)
    assert torch.equal(mask, document_mask(BOUNDS[:, :5].contiguous(), 9)), "however often the end is repeated"
    for row, document in enumerate(documents):
        for i in range(9):
            for j in range(9):
                assert bool(mask[row, 0, i, j]) != (j <= i and document[i] == document[j])


ENGINE = Namespace(
    transformer_impl="transformer_engine",
    hybrid_layer_pattern=None,
    micro_batch_size=1,
    eval_micro_batch_size=None,
    seq_length=9,
    context_parallel_size=1,
    mtp_num_layers=None,
    position_embedding_type="rope",
    apply_rope_fusion=True,
    cuda_graph_impl="none",
    cuda_graph_modules=[],
    cuda_graph_scope_deprecated=None,
)


def engine(**changed):
    return Namespace(**vars(ENGINE) | changed)


def described(parameters):
    """What a CUDA graph compares with what it has captured: shapes of tensors, everything else by value."""
    return {
        name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in vars(parameters).items()
    }


@pytest.mark.parametrize("context_parallel_size", [1, 2])
def test_packed_sequences_cover_the_row_whatever_its_documents(context_parallel_size):
    args = engine(context_parallel_size=context_parallel_size)
    made, other = (packed_sequence_parameters(row, args, 9) for row in BOUNDS)
    assert described(made) == described(other)
    assert made.qkv_format == "thd" and made.max_seqlen_q == made.max_seqlen_kv == 9
    assert made.cu_seqlens_q is made.cu_seqlens_kv and made.cu_seqlens_q.equal(BOUNDS[0])
    padded = made.cu_seqlens_q if context_parallel_size > 1 else None
    assert made.cu_seqlens_q_padded is padded and made.cu_seqlens_kv_padded is padded
    assert made.seq_idx.dtype == torch.int32
    assert made.seq_idx.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 3]], "for Mamba layers"
    assert other.seq_idx.tolist() == [[0] * 9]


ON_HOST = [("--mtp-num-layers", {"mtp_num_layers": 1}), ("--no-rope-fusion", {"apply_rope_fusion": False})]


@pytest.mark.parametrize(("flag", "changed"), ON_HOST)
def test_layers_that_loop_over_documents_get_no_more_than_there_are(flag, changed):
    assert reads_bounds_on_host(engine(**changed)) == flag and reads_bounds_on_host(ENGINE) is None
    made = packed_sequence_parameters(BOUNDS[0], engine(**changed), 9)
    assert made.cu_seqlens_q.tolist() == [0, 2, 5, 6, 9] and made.max_seqlen_q == 3
    assert made.seq_idx.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 3]]


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
    validate_packed_arguments(ENGINE)
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        with pytest.raises(ArgumentError, match=r"one per micro-batch\. Pass --micro-batch-size 1"):
            validate_packed_arguments(engine(**{name: 2}))


GRAPHS = [
    ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
    ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl transformer_engine"),
    ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
    ({"enable_cuda_graph": True}, "--enable-cuda-graph"),
    ({"external_cuda_graph": True}, "--external-cuda-graph"),
]


@pytest.mark.parametrize(("given", "name"), GRAPHS)
def test_graphs_are_refused_with_packs_only_where_they_cannot_capture_them(given, name):
    if "transformer_engine" in name or "external" in name:
        with pytest.raises(ArgumentError, match=f"{name} captures attention and passes it tensors only.*without attn"):
            validate_packed_arguments(engine(**given))
        with pytest.raises(ArgumentError, match=f"{name} captures attention"):
            validate_packed_arguments(engine(**given, cuda_graph_scope_deprecated=["full"]))
        given = given | {"cuda_graph_modules": ["mlp"]}
    validate_packed_arguments(engine(**given))
    for flag, changed in ON_HOST:
        with pytest.raises(ArgumentError, match=f"{name} cannot be used with packs and {flag}: .* Drop one of the two"):
            validate_packed_arguments(engine(**given | changed))
    validate_packed_arguments(engine(**given, apply_rope_fusion=False, position_embedding_type="none"))

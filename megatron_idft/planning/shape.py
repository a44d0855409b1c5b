"""The inputs of every formula of this package: model, layout, batch, precision, implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_idft.errors import PlanError

Sublayer = Literal["attention", "mlp", "moe"]
Layer = tuple[Sublayer, ...]


@dataclass(frozen=True)
class Model:
    """A GPTModel or HybridModel, whole.

    Attributes:
        layers: of each layer the sublayers. GPTModel: ("attention", "mlp") or ("attention", "moe"). HybridModel: one.
        vocab, true_vocab: rows of embedding and output layer, padded; those that are tokens, 0 where not known.
        groups: key and value heads, all of them; equal to `heads` without grouped-query attention.
        gated: the MLP has a gate (SwiGLU): its first matrix has 2 x ffn columns.
        qk_norm: a norm over each head's query and key.
        expert_ffn, shared_expert_ffn: of one routed expert; of all shared ones together, 0 without.
    """

    layers: tuple[Layer, ...]
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool
    rms_norm: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    rope: bool
    true_vocab: int = 0
    learned_positions: int = 0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_expert_ffn: int = 0
    shared_expert_gate: bool = False


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are cut. Data-parallel sizes follow.

    Attributes:
        virtual: chunks of the model on each pipeline stage.
        first_stage_layers, last_stage_layers: of an uneven pipeline; None: even.
        pieces: layers of every (chunk, stage) in the order of the model, where the user has cut it; None: evenly.
        embedding_counts, loss_counts: they take a layer's place in the even split (--account-for-…).
    """

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    pieces: tuple[int, ...] | None = None
    embedding_counts: bool = False
    loss_counts: bool = False

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        return self.gpus // (self.expert_tensor * self.expert * self.pipeline)

    def chunks(self, layers: tuple[Layer, ...]) -> list[list[tuple[Layer, ...]]]:
        """[stage][chunk] -> its layers, as transformer_block.get_num_layers_to_build and -_layer_offset cut them.

        Raises:
            PlanError: the layers cannot be cut so.
        """
        sizes = self._sizes(len(layers))
        starts = [sum(sizes[:position]) for position in range(len(sizes))]
        return [
            [
                layers[starts[chunk * self.pipeline + stage] :][: sizes[chunk * self.pipeline + stage]]
                for chunk in range(self.virtual)
            ]
            for stage in range(self.pipeline)
        ]

    def _sizes(self, count: int) -> list[int]:
        """Layers of every (chunk, stage), in the order of the model."""
        if self.pieces is not None:
            if len(self.pieces) != self.pipeline * self.virtual or sum(self.pieces) != count:
                raise PlanError(
                    f"{count} layers in {len(self.pieces)} pieces do not make {self.pipeline} pipeline stages of"
                    f" {self.virtual} chunks: give --hybrid-layer-pattern one '|' less than stages x chunks"
                )
            return list(self.pieces)
        pieces = self.pipeline * self.virtual
        uneven = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        fixed = {stage: layers for stage, layers in uneven.items() if layers is not None}
        places = count - sum(fixed.values()) + self.embedding_counts + self.loss_counts
        pieces -= len(fixed) * self.virtual
        if (pieces and places % pieces) or any(layers % self.virtual for layers in fixed.values()):
            raise PlanError(
                f"{count} layers cannot be cut into {self.pipeline} pipeline stages of {self.virtual} chunks: choose"
                " --pipeline-model-parallel-size so that it divides them, or pass"
                " --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
            )
        even = places // pieces if pieces else 0
        sizes = [
            fixed[stage] // self.virtual if stage in fixed else even
            for _ in range(self.virtual)
            for stage in range(self.pipeline)
        ]
        sizes[0] -= self.embedding_counts
        sizes[-1] -= self.loss_counts
        return sizes


@dataclass(frozen=True)
class Batch:
    """Sequences of a step.

    Attributes:
        seq_length: of the whole sequence, before context parallelism.
    """

    seq_length: int
    micro: int
    global_: int

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches that each rank passes in a step."""
        return max(1, self.global_ // (self.micro * layout.data))


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    Attributes:
        weight: of parameters and activations.
        gradient: of the buffer that gradients are summed and reduced in.
        main_weight: of the optimizer's own copy of the weights, 0 without one.
        moments: of all optimizer moments together.
        matrix_input: of what a layer's matrix keeps of its input; 1 with FP8, None: as `weight`.
        weight_copies: of the quantized copies that a layer's matrix has beside its weight.
        logits: of the output layer's result (--output-logit-dtype); 0: as the activations.
    """

    weight: int = 2
    gradient: int = 4
    main_weight: int = 4
    moments: int = 8
    matrix_input: int | None = None
    weight_copies: int = 0
    logits: int = 0


@dataclass(frozen=True)
class Recompute:
    """Megatron's --recompute-granularity, -method, -num-layers, -modules."""

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    layers: int = 1
    modules: frozenset[str] = frozenset()
    distribute_inputs: bool = False

    def recomputes(self, module: str) -> bool:
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class Implementation:
    """Which code computes a step, so what it keeps.

    Attributes:
        transformer_engine: its layers with flash attention, else Megatron's local ones with attention written out.
        cpu: torch on a CPU, where dropout keeps its noise in the activations' type.
        fused_activation: --bias-swiglu-fusion and its likes, which keep only the first matrix's output.
        fused_weight_gradient: gradients of weights are added to the buffer at once (--gradient-accumulation-fusion).
        fused_rope: keeps no cosines and sines of its own for each layer.
        softmax_fp32: local attention's softmax in fp32.
        loss: megatron (its cross-entropy), reference or triton (ours).
        head: fused: --sft-loss-head, the output layer with the loss and without logits.
        chunk_tokens: of the fused head (--sft-loss-chunk-tokens); 0: its own choice.
        loss_block_bytes: of the reference loss, one of its two fp32 blocks (loss/reference.py, `_max_rows`).
        optimizer_scratch: torch's optimizers make temporaries of each weight; fused ones none.
    """

    transformer_engine: bool = True
    cpu: bool = False
    fused_activation: bool = True
    fused_weight_gradient: bool = True
    fused_rope: bool = True
    softmax_fp32: bool = False
    loss: Literal["megatron", "reference", "triton"] = "triton"
    head: Literal["materialized", "fused"] = "materialized"
    chunk_tokens: int = 0
    loss_block_bytes: int = 2**26
    optimizer_scratch: bool = False


@dataclass(frozen=True)
class Training:
    """All that a plan is made of.

    Attributes:
        offload: share of the optimizer's states that lies on the host.
    """

    model: Model
    layout: Layout
    batch: Batch
    precision: Precision = field(default_factory=Precision)
    recompute: Recompute = field(default_factory=Recompute)
    implementation: Implementation = field(default_factory=Implementation)
    offload: float = 0.0


def sublayers(layers: tuple[Layer, ...]) -> Iterator[Sublayer]:
    """Every sublayer in the order of the forward pass."""
    for layer in layers:
        yield from layer


def total(items: Mapping[str, int]) -> int:
    return sum(items.values())

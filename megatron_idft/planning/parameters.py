"""Parameters: of the model, and of one rank. Exact, after the constructors of megatron/core/models and transformer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron_idft.errors import PlanError
from megatron_idft.planning.shape import Layer, Layout, Model, Sublayer, sublayers


@dataclass(frozen=True)
class Count:
    """Parameters of one rank's kind.

    Attributes:
        dense: all but routed experts, replicated over data-parallel ranks.
        expert: routed experts, replicated over expert-data-parallel ranks.
        largest: the largest single matrix.
    """

    dense: int = 0
    expert: int = 0
    largest: int = 0

    @property
    def all(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert, max(self.largest, other.largest))


def check_divisions(model: Model, layout: Layout) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        PlanError: tensor or expert parallelism does not divide what it cuts.
    """
    wanted = [
        (model.heads, layout.tensor, "attention heads", "--tensor-model-parallel-size"),
        (model.ffn, layout.tensor, "columns of the MLP", "--tensor-model-parallel-size"),
        (model.vocab, layout.tensor, "rows of the padded vocabulary", "--tensor-model-parallel-size"),
        (model.shared_expert_ffn, layout.tensor, "columns of the shared experts", "--tensor-model-parallel-size"),
        (model.expert_ffn, layout.expert_tensor, "columns of an expert", "--expert-tensor-parallel-size"),
        (model.experts, layout.expert, "experts", "--expert-model-parallel-size"),
    ]
    for size, parts, what, flag in wanted:
        if size % parts:
            raise PlanError(f"{flag} {parts} does not divide {size} {what}: choose one that does")
    if max(model.groups, layout.tensor) % min(model.groups, layout.tensor):
        raise PlanError(
            f"--tensor-model-parallel-size {layout.tensor} and {model.groups} query groups do not divide each other:"
            " choose a size that divides them"
        )


def _norm(model: Model, width: int) -> int:
    return width if model.rms_norm else 2 * width


def groups_per_rank(model: Model, layout: Layout) -> int:
    """Key and value heads on a tensor-parallel rank; at least one, copied where there are fewer than ranks."""
    return max(1, model.groups // layout.tensor)


def sublayer_count(model: Model, layout: Layout, sublayer: Sublayer) -> Count:
    """Of one sublayer on one rank, its norm included."""
    if sublayer == "attention":
        return _attention(model, layout)
    if sublayer == "mlp":
        mlp = _mlp(model, model.ffn // layout.tensor)
        return Count(_norm(model, model.hidden)) + mlp
    return _moe(model, layout)


def _attention(model: Model, layout: Layout) -> Count:
    hidden, query = model.hidden, model.heads // layout.tensor * model.head_dim
    # Below one group per rank the whole projection is cut evenly (attention.py), and gathered when it is used.
    columns = (model.heads + 2 * model.groups) * model.head_dim // layout.tensor
    matrices = hidden * columns + query * hidden
    bias = columns * (model.linear_bias or model.qkv_bias) + hidden * model.linear_bias
    norms = _norm(model, hidden) + 2 * _norm(model, model.head_dim) * model.qk_norm
    return Count(matrices + bias + norms, 0, hidden * columns)


def _mlp(model: Model, ffn: int) -> Count:
    columns = ffn * (2 if model.gated else 1)
    matrices = model.hidden * (columns + ffn)
    bias = (columns + model.hidden) * model.linear_bias
    return Count(matrices + bias, 0, model.hidden * columns)


def _moe(model: Model, layout: Layout) -> Count:
    router = model.hidden * model.experts + model.experts * model.linear_bias
    shared = Count()
    if model.shared_expert_ffn:
        # Shared experts have no bias (moe/shared_experts.py).
        shared = _mlp(replace(model, linear_bias=False), model.shared_expert_ffn // layout.tensor)
        shared += Count(model.hidden * model.shared_expert_gate)
    expert = _mlp(model, model.expert_ffn // layout.expert_tensor)
    experts = Count(0, expert.dense * (model.experts // layout.expert), expert.largest)
    return Count(_norm(model, model.hidden) + router) + shared + experts


def layers_count(model: Model, layout: Layout, layers: tuple[Layer, ...]) -> Count:
    result = Count()
    for sublayer, times in Counter(sublayers(layers)).items():
        each = sublayer_count(model, layout, sublayer)
        result += Count(each.dense * times, each.expert * times, each.largest)
    return result


def stage_count(model: Model, layout: Layout, stage: int) -> Count:
    """Of one rank of a pipeline stage. With tied embeddings and several stages the last one has a copy."""
    result = Count()
    for chunk in layout.chunks(model.layers)[stage]:
        result += layers_count(model, layout, chunk)
    embedding = model.vocab // layout.tensor * model.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        result += Count(embedding, 0, embedding) + Count(model.learned_positions * model.hidden)
    if last:
        result += Count(_norm(model, model.hidden))
        if not model.tied or not first:
            result += Count(embedding, 0, embedding)
    return result


def matrix_before_output(model: Model, layout: Layout) -> int:
    """Elements of the last layer's last matrix on a rank: what comes before the output layer's."""
    *_, last = sublayers(model.layers)
    rows = {
        "attention": model.heads * model.head_dim // layout.tensor,
        "mlp": model.ffn // layout.tensor,
        "moe": model.expert_ffn // layout.expert_tensor,
    }
    return rows[last] * model.hidden


def model_count(model: Model) -> int:
    """Of the whole model; tied embeddings count once."""
    return stage_count(model, Layout(gpus=1), 0).all


def active_count(model: Model) -> int:
    """Parameters that one token meets: of the routed experts those that it is sent to."""
    if not model.experts:
        return model_count(model)
    count = stage_count(model, Layout(gpus=1), 0)
    return count.dense + count.expert * model.experts_per_token // model.experts

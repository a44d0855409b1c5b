"""Bytes that one micro-batch keeps in a sublayer until its backward pass, item by item.

Derived from what each operation of the layer saves for its backward pass, in megatron/core 0.19:

- local layers: transformer_layer.py, attention.py, dot_product_attention.py, mlp.py, fused_softmax.py and torch's own
  norms and dropout. Attention is written out, so s x s scores are kept.
- Transformer Engine: norms fused into the linear layer after them, flash attention (no scores; its output, and one
  fp32 number per row), fused SwiGLU. For LayerNorm, GELU of 4 h, one group per head, dropout and sequence parallelism
  this is the 34 s b h / t of Korthikanti et al., arXiv 2205.05198, without scores and rope. With FP8 each matrix keeps
  its input as FP8, in the one orientation that its backward pass needs (module/linear.py, layernorm_linear.py and
  grouped_linear.py of 2.20), and the attention its own result in 16 bits besides.

Names of sizes: e bytes of an element; e_in those of a matrix's input; t tokens of a micro-batch on a rank (s b / cp);
t_sp the same, cut once more by sequence parallelism; q, kv columns of queries and of keys on a rank; f columns of the
MLP on a rank.

A sublayer's items include its input, the residual stream, where its norm keeps it. `extra` is what its backward pass
needs at its worst moment beyond the items of this sublayer; it is negative where items are freed before that moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idft.planning.parameters import groups_per_rank
from megatron_idft.planning.shape import Sublayer, Training, total

_FP32, _INT64 = 4, 8
INPUT = "residual stream"


@dataclass(frozen=True)
class Kept:
    """Bytes that a sublayer keeps.

    Attributes:
        items: name -> bytes until the backward pass.
        extra: see the module's text.
        input: the bytes that recompute keeps.
    """

    items: dict[str, int]
    extra: int
    input: int

    @property
    def bytes(self) -> int:
        return total(self.items)


@dataclass(frozen=True)
class Sizes:
    """The sizes named at the top of the module."""

    e: int
    e_in: int
    t: int
    t_sp: int
    q: int
    kv: int
    f: int
    scores: int

    @staticmethod
    def of(training: Training) -> Sizes:
        model, layout, batch = training.model, training.layout, training.batch
        sequence = batch.seq_length // layout.context
        t = sequence * batch.micro
        heads = model.heads // layout.tensor
        return Sizes(
            e=training.precision.weight,
            e_in=training.precision.matrix_input or training.precision.weight,
            t=t,
            t_sp=t // layout.tensor if layout.sequence_parallel else t,
            q=heads * model.head_dim,
            kv=groups_per_rank(model, layout) * model.head_dim,
            f=model.ffn // layout.tensor,
            scores=batch.micro * heads * sequence * sequence,
        )


def kept_by(training: Training, sublayer: Sublayer) -> Kept:
    """The bytes of one micro-batch in a sublayer, with the selective recompute that the training asks for."""
    if sublayer == "attention":
        return _attention_te(training) if training.implementation.transformer_engine else _attention_local(training)
    if sublayer == "mlp":
        return _mlp(training)
    return _moe(training)


def norm(training: Training, tokens: int, width: int, result: int) -> int:
    """Kept by a norm besides its input; `result`: bytes per element of its result, as the matrix after it keeps it."""
    e, model = training.precision.weight, training.model
    kept = tokens * width * result
    if training.implementation.transformer_engine:
        return kept + tokens * _FP32 * (1 if model.rms_norm else 2)
    if model.rms_norm:  # torch writes it out in fp32: a copy of 16-bit input, and the normalised values
        return kept + tokens * width * _FP32 * (2 if e < _FP32 else 1) + tokens * _FP32
    return kept + 2 * tokens * _FP32


def stream(training: Training) -> int:
    """The input of a norm. A norm that has made an fp32 copy of it needs it no more."""
    size = Sizes.of(training)
    copied = training.model.rms_norm and not training.implementation.transformer_engine and size.e < _FP32
    return 0 if copied else size.t_sp * training.model.hidden * size.e


def _dropout(training: Training, elements: int, probability: float) -> int:
    """The mask: one byte on a GPU, the noise in the activations' type on a CPU."""
    if probability == 0.0:
        return 0
    return elements * (training.precision.weight if training.implementation.cpu else 1)


def _stream(training: Training, size: Sizes, result: int) -> dict[str, int]:
    hidden = training.model.hidden
    normed = norm(training, size.t_sp, hidden, 0 if training.recompute.recomputes("layernorm") else result)
    return {
        INPUT: stream(training),
        "norm": normed,
        "hidden dropout": _dropout(training, size.t_sp * hidden, training.model.hidden_dropout),
    }


def _weight_gradient(training: Training, elements: int) -> int:
    """A gradient that exists beside the buffer until it is added to it."""
    return 0 if training.implementation.fused_weight_gradient else elements * training.precision.weight


def _attention_local(training: Training) -> Kept:
    model, implementation = training.model, training.implementation
    size = Sizes.of(training)
    e, t, q, kv = size.e, size.t, size.q, size.kv
    grouped = kv < q
    recomputed = training.recompute.recomputes("core_attn")
    # The norms of queries and keys need their inputs, unless they have made fp32 copies of them.
    norms_keep_input = model.qk_norm and not (model.rms_norm and e < _FP32)
    items = _stream(training, size, e)
    # Values are a view of the projection; grouped ones are copied for each head instead.
    projected = t * (q + 2 * kv) * e if not grouped or recomputed or norms_keep_input else 0
    # Queries of several heads to a group are copied out of the projection.
    copied_query = t * q * e if grouped and (norms_keep_input or not (model.rope or model.qk_norm)) else 0
    query_and_key = t * q * e + (t * kv * e if not grouped or recomputed else 0)
    items["projected query, key, value"] = projected + copied_query
    if model.qk_norm:
        items["query and key norms"] = norm(training, t, q, 0) + norm(training, t, kv, 0)
    if model.rope or model.qk_norm:
        items["rotated or normed query and key"] = query_and_key
    if model.rope and not implementation.fused_rope:
        items["cosines and sines"] = 4 * training.batch.seq_length // training.layout.context * model.head_dim * e
    repeated = 2 * t * q * e if grouped else 0
    # The softmax keeps its result; the product with the values keeps it in 16 bits, or what dropout leaves of it.
    noise = _dropout(training, size.scores, model.attention_dropout)
    upcast = implementation.softmax_fp32 and e < _FP32
    probabilities = size.scores * (_FP32 if upcast else e) + noise + size.scores * e * bool(upcast or noise)
    mask = (training.batch.seq_length // training.layout.context) ** 2
    context = t * q * e
    items["attention output"] = context
    at_worst = 4 * size.scores * e + size.t_sp * model.hidden * e + t * q * e  # gradients of scores, stream, values
    if recomputed:
        return Kept(items, at_worst + repeated + mask + t * q * e, size.t_sp * model.hidden * e)
    items["repeated keys and values"] = repeated
    items["attention probabilities"] = probabilities
    items["causal mask"] = mask
    freed = probabilities + mask + context + repeated // 2 + (0 if norms_keep_input else projected)
    return Kept(items, at_worst - freed, size.t_sp * model.hidden * e)


def _attention_te(training: Training) -> Kept:
    model, size = training.model, Sizes.of(training)
    e, t, q, kv = size.e, size.t, size.q, size.kv
    items = _stream(training, size, size.e_in)
    items["projected query, key, value"] = t * (q + 2 * kv) * e
    if model.qk_norm:
        items["query and key norms"] = norm(training, t * (q + kv) // model.head_dim, model.head_dim, 0)
    if model.rope or model.qk_norm:
        items["rotated or normed query and key"] = t * (q + kv) * e
    items["attention output"] = t * q * (e if size.e_in == e else e + size.e_in)
    if not training.recompute.recomputes("core_attn"):
        items["attention row sums"] = t * q // model.head_dim * _FP32
    # Gradients of the stream, of the attention's output and of query, key and value.
    extra = size.t_sp * model.hidden * e + t * q * e + t * (q + 2 * kv) * e
    extra += _weight_gradient(training, model.hidden * (q + 2 * kv))
    return Kept(items, extra, size.t_sp * model.hidden * e)


def _mlp_inside(training: Training, rows: int, ffn: int, scaled: bool = False, act_recomputed: bool = False) -> int:
    """Kept between an MLP's first matrix and its second. scaled: experts multiply by the router's probability."""
    size = Sizes.of(training)
    columns = 2 if training.model.gated else 1
    if not training.implementation.fused_activation:  # gated: SiLU's result, the linear half's copy; then their product
        columns += (2 if training.model.gated else 0) + scaled
    return rows * ffn * (columns * size.e + (0 if act_recomputed else size.e_in))


def _mlp_extra(training: Training, rows: int, ffn: int) -> int:
    """The gradients of both halves, or of the second matrix and its input, whichever is more."""
    e = training.precision.weight
    return max(2 * rows * ffn * e, rows * ffn * e + _weight_gradient(training, training.model.hidden * ffn))


def _mlp(training: Training) -> Kept:
    size = Sizes.of(training)
    items = _stream(training, size, size.e_in)
    entering = size.t_sp * training.model.hidden * size.e
    inside = _mlp_inside(training, size.t, size.f)
    extra = entering + _mlp_extra(training, size.t, size.f)
    if training.recompute.recomputes("mlp"):
        return Kept(items, extra + inside, entering)
    items["MLP"] = inside
    return Kept(items, extra, entering)


def routed_tokens(training: Training) -> int:
    """Token copies that reach the experts of one rank, if the router spreads them evenly."""
    layout = training.layout
    return Sizes.of(training).t_sp * layout.expert_tensor * training.model.experts_per_token


def _moe(training: Training) -> Kept:
    model, size = training.model, Sizes.of(training)
    hidden, e = model.hidden, size.e
    items = _stream(training, size, e)  # the router reads it too
    rows, ffn = routed_tokens(training), model.expert_ffn // training.layout.expert_tensor
    act = training.recompute.recomputes("moe_act")
    # Logits, probabilities and what top-k keeps, in fp32, with a mask; expert ids.
    router = size.t_sp * (model.experts * (3 * _FP32 + 1) + 2 * model.experts_per_token * _INT64)
    inside = {
        "router": router,
        "experts": rows * hidden * size.e_in + _mlp_inside(training, rows, ffn, scaled=True, act_recomputed=act),
        "token order": rows * (2 * _INT64 + _FP32),
    }
    shared = model.shared_expert_ffn // training.layout.tensor
    extra = size.t_sp * hidden * e + 2 * rows * hidden * e + _mlp_extra(training, rows, ffn)
    if shared and training.recompute.recomputes("shared_experts"):
        extra += _mlp_inside(training, size.t, shared)
    elif shared:
        quantized = size.t_sp * hidden * size.e_in if size.e_in < e else 0
        inside["shared experts"] = quantized + _mlp_inside(training, size.t, shared)
    if training.recompute.recomputes("moe"):
        return Kept(items, extra + total(inside), size.t_sp * hidden * e)
    return Kept(items | inside, extra, size.t_sp * hidden * e)

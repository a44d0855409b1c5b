"""Which models the decode engine serves, and their forward pass without a loss and without a vocabulary gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.errors import UnservedModelError
from megatron_idft.inference.direct_layers import DirectLayers, direct_layers

_ATTENTION, _MLP, _MOE = "*", "-", "E"  # of megatron/core/models/hybrid/hybrid_layer_allocation.py
_FUSED_ROTATION = ("apply_rope_fusion", "fused_single_qkv_rope")  # these kernels take one table of angles for all rows
_SERVED_BY = "_served_by"  # the attribute of a model that has the latest ServedModel of it


class ServedModel:
    """A whole GPTModel or HybridModel of attention, MLP and expert layers, as this tensor-parallel rank holds it.

    The pass is that of their `forward` (megatron/core/models/gpt/gpt_model.py, hybrid/hybrid_model.py at core_v0.19.0)
    between embedding and output layer, but each row has its own positions and each rank keeps its shard of the logits.

    Args:
        model: what Megatron's training setup returned: one chunk, wrapped or not.
        max_positions: the longest sequence.

    Raises:
        UnservedModelError: as in `require_served`.

    Attributes:
        direct: computes the layers where their modules would take longer; None where they do not.
    """

    def __init__(self, model: Sequence[torch.nn.Module], max_positions: int) -> None:
        self.language_model = require_served(model)
        self.config = self.language_model.config
        self.attentions: list[Any] = [m for m in self.language_model.decoder.modules() if hasattr(m, "core_attention")]
        self._settings = self._change_settings()
        self.tp_group: ProcessGroup = self.language_model.pg_collection.tp
        weight = next(self.language_model.parameters())
        self.device, self.dtype = weight.device, self.config.params_dtype
        self.has_experts = self.config.num_moe_experts is not None
        self._angles = self._rotary_angles(max_positions)
        self.direct: DirectLayers | None = direct_layers(self, self._angles)

    def close(self) -> None:
        """Give the model its own settings back, unless a later engine serves it by now: that one gives them back."""
        if vars(self.language_model).get(_SERVED_BY) is self:
            del vars(self.language_model)[_SERVED_BY]
            for owner, name, value in self._settings:
                setattr(owner, name, value)

    def _change_settings(self) -> list[tuple[Any, str, bool]]:
        """Evaluation without fused rotation; returns what was set before the first engine on this model."""
        earlier: ServedModel | None = vars(self.language_model).get(_SERVED_BY)
        configs = [self.config, *(attention.config for attention in self.attentions)]
        found = [(module, "training", module.training) for module in self.language_model.modules()]
        found += [(config, name, getattr(config, name)) for config, name in product(configs, _FUSED_ROTATION)]
        vars(self.language_model)[_SERVED_BY] = self
        self.language_model.eval()
        for config, name in product(configs, _FUSED_ROTATION):
            setattr(config, name, False)
        return found if earlier is None else earlier._settings

    def _rotary_angles(self, max_positions: int) -> Tensor | None:
        """[max_positions, 1, 1, d] fp32, with the model's own base, scaling and interleaving."""
        if self.language_model.position_embedding_type != "rope":
            return None
        embedding: Tensor = self.language_model.rotary_pos_emb.get_emb(max_positions)
        return embedding.to(self.device)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[s, n, h] after the last layer, for tokens and positions int64 [n, s]. Collectives: the layers' own."""
        model = self.language_model
        states = model.embedding(input_ids=tokens, position_ids=positions)
        if self.direct is not None:
            return self.direct(states, positions)
        angles = None
        if self._angles is not None:
            angles = self._angles[positions.transpose(0, 1), 0, 0].unsqueeze(2)  # [s, n, 1, d]
        states = model.decoder(hidden_states=states, attention_mask=None, rotary_pos_emb=angles)
        found: Tensor = states[0] if isinstance(states, tuple) else states
        return found

    def logits(self, states: Tensor) -> Tensor:
        """[..., V/tp] of this rank's shard of the padded vocabulary, in the model's dtype; no collective."""
        model = self.language_model
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits, _ = model.output_layer(states, weight=weight, runtime_gather_output=False)
        scaled: Tensor = model._scale_logits(logits)
        return scaled


def require_served(model: Sequence[torch.nn.Module]) -> Any:
    """The language model itself, if the engine can decode from it.

    Raises:
        UnservedModelError: it cannot; names every reason.
    """
    from megatron.core.utils import unwrap_model

    found = unwrap_model(list(model))
    require_served_layout(found[0].config.sequence_parallel)
    _refuse(list(_model_reasons(found[0])))
    return found[0]


def require_served_layout(sequence_parallel: bool) -> None:
    """Refuse, before a model is loaded, pipeline stages, context parallelism and sequence parallelism.

    Raises:
        UnservedModelError: the layout is not served; names every reason.
    """
    from megatron.core import mpu

    reasons = []
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        reasons.append(
            "it is cut into pipeline stages (drop the pipeline flags and use --tensor-model-parallel-size; checkpoints"
            " load under any layout)"
        )
    if mpu.get_context_parallel_world_size() > 1:
        reasons.append("context parallelism is on (drop --context-parallel-size)")
    if sequence_parallel:
        reasons.append(
            "sequence parallelism would split single tokens (drop --sequence-parallel; the weights are the same)"
        )
    _refuse(reasons)


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise UnservedModelError("this model cannot be decoded from: " + "; ".join(reasons))


def _model_reasons(model: Any) -> Iterator[str]:
    from megatron.core import mpu
    from megatron.core.transformer.attention import SelfAttention

    config = model.config
    layers = getattr(model.decoder, "layer_type_list", None) or [_ATTENTION]
    others = sorted(set(layers) - {_ATTENTION, _MLP, _MOE})
    if others:
        yield f"layers of the kinds {' '.join(others)} keep a state of their own, for which there are no slots"
    attentions = [module for module in model.decoder.modules() if hasattr(module, "core_attention")]
    foreign = {type(module).__name__ for module in attentions if not isinstance(module, SelfAttention)}
    if foreign or config.multi_latent_attention:
        kind = ", ".join(sorted(foreign)) or "multi-latent attention"
        yield f"{kind} caches other tensors than keys and values per head"
    kind = getattr(model, "position_embedding_type", "none")
    if kind not in ("rope", "learned_absolute", "none"):
        yield f"--position-embedding-type {kind}: only rope, learned_absolute and none are served"
    if config.window_size is not None:
        yield "sliding-window attention is not served"
    if config.softmax_type != "vanilla":
        yield f"--softmax-type {config.softmax_type} is not served"
    if config.apply_query_key_layer_scaling:
        yield "--apply-query-key-layer-scaling is not served"
    if config.fp8 or config.fp4:
        yield "FP8 and FP4 need batches of a multiple of 8 rows (drop the flag and decode in bf16)"
    if config.num_moe_experts is not None:
        if config.moe_expert_capacity_factor is not None:
            yield "experts that drop tokens would see the padding (drop --moe-expert-capacity-factor)"
        tensor_ranks = torch.distributed.get_process_group_ranks(mpu.get_tensor_model_parallel_group())
        expert_ranks = torch.distributed.get_process_group_ranks(mpu.get_expert_model_parallel_group())
        if not set(expert_ranks) <= set(tensor_ranks):
            yield (
                "experts are spread over data-parallel replicas, which decode independently (use an"
                " --expert-model-parallel-size that divides --tensor-model-parallel-size, with"
                " --expert-tensor-parallel-size 1)"
            )

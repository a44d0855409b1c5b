"""The layers of a dense model on a CPU, computed from their weights without Megatron's modules around them.

A decode step multiplies so little there that the modules' own work shows: per layer they build rotary sines and cosines
twice, go through autograd functions that do nothing on one rank, and copy what a view would give. This is the same
arithmetic, in the order of megatron/core/transformer/{transformer_layer,attention,mlp}.py at core_v0.19.0, of the one
form of layer that Llama, Mistral, Qwen and SmolLM have. A model with anything else in it keeps Megatron's modules, and
so does one with hooks on them; hooks that are registered later are not called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from megatron_idft.inference.served import ServedModel


class DirectLayers:
    """Reads the weights where they are at each call, and changes nothing of the model.

    Args:
        angles: [max_positions, 1, 1, d] fp32, the rotary angles.

    Attributes:
        packed: linear layer -> its weight as `packed_weights.py` has re-ordered it, for the calls in which that is the
            faster one.
    """

    def __init__(self, model: ServedModel, angles: Tensor) -> None:
        decoder = model.language_model.decoder
        self.packed: dict[Any, Tensor] = {}
        self._group: ProcessGroup = model.tp_group
        self._norm = getattr(decoder, "final_layernorm", None) or decoder.final_norm
        self._layers: list[_Attention | _Mlp] = []
        for layer in decoder.layers:
            if not _absent(layer.self_attention):
                self._layers.append(_Attention(layer, self))
            if not _absent(layer.mlp):
                self._layers.append(_Mlp(layer, self))
        mscale = model.attentions[0]._yarn_concentration_factor
        angles = angles[:, 0, 0]
        cos, sin = angles.cos() * mscale, angles.sin() * mscale
        sin[:, : angles.shape[1] // 2].neg_()  # of what `roll` brings there
        self._tables = cos, sin

    @torch.inference_mode()
    def __call__(self, states: Tensor, positions: Tensor) -> Tensor:
        """[s, n, h] embeddings of tokens at positions int64 [n, s] -> [s, n, h] after the last norm.

        Collectives: one all-reduce for each attention and MLP over the tensor-parallel group.
        """
        shape = states.shape
        batch = _Batch(*shape[:2], *(table[positions.t()].flatten(0, 1)[:, None, None] for table in self._tables))
        states = states.flatten(0, 1)
        for layer in self._layers:
            states = layer(states, batch)
        normed: Tensor = self._norm(states)
        return normed.view(shape)

    def multiply(self, layer: Any, states: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: the product with a layer's weight, plus `bias` [out], plus `add` [n, out]."""
        packed = self.packed.get(layer)
        if packed is None:
            product: Tensor = linear(states, layer.weight, bias)
            return product if add is None else product.add_(add)
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        if add is None:
            product = multiply.default(states, packed, bias, "none", [], "")
        else:
            product = multiply.binary(states, add, packed, bias, "add")
        return product

    def multiply_rows(self, layer: Any, states: Tensor, add: Tensor) -> Tensor:
        """The same for a RowParallelLinear, with its bias: summed over the ranks, of which one adds the rest."""
        if self._group.size() == 1:
            return self.multiply(layer, states, layer.bias, add)
        rest = (layer.bias, add) if self._group.rank() == 0 else (None, None)
        product = self.multiply(layer, states, *rest)
        torch.distributed.all_reduce(product, group=self._group)
        return product


class _Batch(NamedTuple):
    """s, n: its shape. cos, sin: [s * n, 1, 1, d], for groups of heads and heads of a group."""

    s: int
    n: int
    cos: Tensor
    sin: Tensor


class _Attention:
    def __init__(self, layer: Any, layers: DirectLayers) -> None:
        self.norm, self.module, self.layers = layer.input_layernorm, layer.self_attention, layers
        self.groups = self.module.num_query_groups_per_partition
        self.heads = self.module.num_attention_heads_per_partition // self.groups  # of queries in a group
        self.head_size = self.module.hidden_size_per_attention_head
        norms = self.module.q_layernorm, self.module.k_layernorm
        self.head_norms = None if all(map(_absent, norms)) else norms

    def __call__(self, states: Tensor, batch: _Batch) -> Tensor:
        module, heads = self.module, self.heads
        mixed = self.layers.multiply(module.linear_qkv, self.norm(states), module.linear_qkv.bias)
        # A group's query heads, its key, its value.
        mixed = mixed.view(-1, self.groups, heads + 2, self.head_size)
        turned, value = mixed[:, :, : heads + 1], mixed[:, :, heads + 1]
        if self.head_norms is not None:
            query, key = (norm(part) for norm, part in zip(self.head_norms, turned.split([heads, 1], -2), strict=True))
            turned = torch.cat([query, key], -2)
        turned = torch.addcmul(turned * batch.cos, turned.roll(self.head_size // 2, -1), batch.sin)
        query, key = turned[:, :, :heads].flatten(1, 2), turned[:, :, heads]
        attended = module.core_attention(*(x.unflatten(0, (batch.s, batch.n)) for x in (query, key, value)))
        return self.layers.multiply_rows(module.linear_proj, attended.flatten(0, 1), states)


class _Mlp:
    def __init__(self, layer: Any, layers: DirectLayers) -> None:
        self.norm, self.module, self.layers = layer.pre_mlp_layernorm, layer.mlp, layers

    def __call__(self, states: Tensor, batch: _Batch) -> Tensor:
        first = self.module.linear_fc1
        gate, up = self.layers.multiply(first, self.norm(states), first.bias).chunk(2, -1)
        return self.layers.multiply_rows(self.module.linear_fc2, silu(gate).mul_(up), states)


def direct_layers(model: ServedModel, angles: Tensor | None) -> DirectLayers | None:
    """None for a model that has anything of another form, and on a GPU, where steps are graphs or kernels fused."""
    if angles is None or any(_other_forms(model, angles)):
        return None
    return DirectLayers(model, angles)


def _absent(module: Any) -> bool:
    from megatron.core.transformer.identity_op import IdentityOp

    return module is None or isinstance(module, IdentityOp)


def _other_forms(model: ServedModel, angles: Tensor) -> Iterator[bool]:
    """Whether something is not as these layers have it, one question after the other."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_layer import TransformerLayer

    config, decoder = model.config, model.language_model.decoder
    yield model.device.type != "cpu" or model.dtype != torch.float32
    yield type(decoder).forward not in (TransformerBlock.forward, HybridStack.forward)
    yield config.rotary_interleaved or config.fp32_residual_connection or bool(config.no_rope_freq)
    yield config.attention_output_gate or config.num_query_groups < model.tp_group.size()
    yield angles.shape[-1] != model.attentions[0].hidden_size_per_attention_head
    yield not config.gated_linear_unit or config.activation_func is not silu or config.use_te_activation_func
    yield config.activation_func_clamp_value is not None or config.glu_linear_offset != 0
    yield any(hooks for module in decoder.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))
    norms = [getattr(decoder, "final_layernorm", None) or getattr(decoder, "final_norm", None)]
    for layer in decoder.layers:
        yield type(layer) not in (TransformerLayer, MLPLayer)
        yield not _absent(layer.cross_attention) or not _absent(layer.pre_cross_attn_layernorm)
        if not _absent(layer.self_attention):
            attention = layer.self_attention
            norms += [layer.input_layernorm, attention.q_layernorm, attention.k_layernorm]
            yield type(attention).forward is not SelfAttention.forward or attention.config.test_mode
            yield type(attention).get_query_key_value_tensors is not SelfAttention.get_query_key_value_tensors
            yield type(attention.linear_qkv) is not ColumnParallelLinear
            yield type(attention.linear_proj) is not RowParallelLinear
        if not _absent(layer.mlp):
            norms.append(layer.pre_mlp_layernorm)
            yield type(layer.mlp) is not MLP
            yield type(layer.mlp.linear_fc1) is not ColumnParallelLinear
            yield type(layer.mlp.linear_fc2) is not RowParallelLinear
    yield not {type(norm) for norm in norms if not _absent(norm)} <= {torch.nn.RMSNorm, torch.nn.LayerNorm}
    yield _absent(norms[0])

"""Layers that need neither Transformer Engine nor APEX: norms under sequence parallelism, and HybridModel.

Stock `--transformer-impl local` serves GPTModel, without sequence parallelism. `install()` adds what is missing
where Transformer Engine is absent: torch norms that allow `--sequence-parallel`, and `hybrid_stack_spec` as
HybridModel's default. On a GPU with Transformer Engine it changes nothing; there the spec can be named with the
stock flag `--spec megatron_idft.integration.platform.local_layers hybrid_stack_spec`.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.platform import upstream


class LocalNorm:
    """torch's LayerNorm or RMSNorm, as the config asks, with or without sequence parallelism.

    transformer/torch_norm.py refuses sequence parallelism because torch's norms do not mark their parameters. Under
    it every tensor-parallel rank sees a part of the sequence, so distributed/finalize_model_grads.py must sum their
    gradients over the ranks; it does so for parameters that carry `sequence_parallel`, as APEX's FusedLayerNorm
    sets it.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        return _build_norm(config, hidden_size, eps)


_upstream_norm = WrappedTorchNorm.__new__


def _build_norm(config: Any, hidden_size: int, eps: float) -> Any:
    whole_sequence = copy.copy(config)
    whole_sequence.sequence_parallel = False
    norm = _upstream_norm(WrappedTorchNorm, whole_sequence, hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class LocalSelfAttention(SelfAttention):
    """SelfAttention with local norms under `--qk-layernorm`, where transformer/attention.py takes Transformer Engine's.

    The spec cannot name them: upstream refuses a norm in the spec when the config has none.
    """

    def __init__(self, config: Any, submodules: SelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        if config.qk_layernorm:
            submodules = dataclasses.replace(submodules, q_layernorm=LocalNorm, k_layernorm=LocalNorm)
        super().__init__(config, submodules, *args, **kwargs)


class LocalHybridStack(HybridStack):
    """HybridStack with a local final norm; models/hybrid/hybrid_block.py hard-wires Transformer Engine's."""

    def __init__(self, config: Any, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


class UnservedLayer(MegatronModule):
    """A layer of a hybrid pattern that has no implementation without its kernels."""

    def __init__(self, *args: Any, symbol: str, needs: str, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            f"'{symbol}' in --hybrid-layer-pattern needs {needs}, so it cannot be built from local layers. "
            "Install them on a machine with a GPU, or use a pattern of '*' (attention), '-' (MLP) and 'E' (MoE)."
        )


def _unserved(symbol: str, needs: str) -> ModuleSpec:
    return ModuleSpec(module=UnservedLayer, params={"symbol": symbol, "needs": needs})


_linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

# As models/hybrid/hybrid_layer_specs.py, in local layers. Transformer Engine fuses a norm into the linear layer
# after it; the key maps name the local norms in checkpoints as the fused ones, so that checkpoints load into both.
hybrid_stack_spec = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=_unserved("M", "the packages mamba-ssm and causal-conv1d and Transformer Engine"),
        gdn_layer=_unserved("G", "the package flash-linear-attention and Transformer Engine"),
        dsa_layer=_unserved("D", "Transformer Engine"),
        mla_layer=_unserved("+", "Transformer Engine"),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=LocalNorm,
                self_attention=ModuleSpec(
                    module=LocalSelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=DotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=partial(MLP.as_mlp_submodule, submodules=_linears),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False),  # any number; not read
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(
                        module=MultiTokenPredictionLayer,
                        submodules=MultiTokenPredictionLayerSubmodules(
                            enorm=LocalNorm,
                            hnorm=LocalNorm,
                            eh_proj=ColumnParallelLinear,
                            mtp_model_layer=None,  # built from the pattern
                            layer_norm=LocalNorm,
                        ),
                    )
                ]
            ),
        ),
    ),
)


def install() -> None:
    """Where Transformer Engine is absent, let torch's norms run under sequence parallelism and HybridModel build."""
    if HAVE_TE:
        return

    # Every importer of the class (backends.py, gpt_layer_specs.py, transformer_block.py) holds the class itself.
    def build_norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> Any:
        return _build_norm(config, hidden_size, eps)

    upstream.replace("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", build_norm)
    # The stock spec cannot be built without Transformer Engine; models/hybrid.py took its own reference at import.
    specs = "megatron.core.models.hybrid.hybrid_layer_specs"
    for target in (f"{specs}:hybrid_stack_spec", f"{specs}:mamba_stack_spec"):
        upstream.replace(target, hybrid_stack_spec)
    upstream.replace("megatron.training.models.hybrid:default_hybrid_stack_spec", hybrid_stack_spec)
    inference_linear = "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear"
    if upstream.exists(inference_linear):
        upstream.replace(inference_linear, lambda module: False)

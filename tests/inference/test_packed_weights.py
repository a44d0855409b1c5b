"""oneDNN's copies of the weights in decode steps: used where they should be, the same products, never stale."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny_models
from tests.inference.test_engine import SLOPE, pairs, told_and_found


def test_products_are_those_of_the_weights_as_they_are_now(megatron_layers):
    from megatron_idft.inference.packed_weights import PackedWeights

    model, layers = megatron_layers
    packed = PackedWeights(model)
    assert packed.bytes == sum(layer.weight.nbytes for layer in layers)
    with torch.no_grad():
        for rows in (2, 3, 64, 65):
            states = torch.randn(rows, 1, 24)
            plain = multiplied(layers, states)
            with packed.used(rows):
                assert all(("_forward_impl" in layer.__dict__) == (3 <= rows <= 64) for layer in layers), rows
                torch.testing.assert_close(multiplied(layers, states), plain)
            assert not any("_forward_impl" in layer.__dict__ for layer in layers)
        states = torch.randn(8, 1, 24)
        layers[1].weight.mul_(2)
        doubled = multiplied(layers, states)
        with packed.used(8):
            torch.testing.assert_close(multiplied(layers, states), doubled)
    packed.close()


def test_copies_that_do_not_fit_are_not_made(megatron_layers, monkeypatch):
    from megatron_idft.inference import packed_weights

    model, layers = megatron_layers
    available = 4 * sum(layer.weight.nbytes for layer in layers)
    for free, made in ((available, True), (available - 1, False)):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(packed_weights.psutil, "virtual_memory", lambda memory=memory: memory)
        packed = packed_weights.PackedWeights(model)
        assert bool(packed.bytes) is made
        with packed.used(8):
            assert any("_forward_impl" in layer.__dict__ for layer in layers) is made


def test_small_weights_are_not_copied(megatron_layers, monkeypatch):
    from megatron_idft.inference import packed_weights

    model, layers = megatron_layers
    monkeypatch.setattr(packed_weights, "_FEWEST_WEIGHTS", layers[0].weight.numel() + 1)
    assert packed_weights.PackedWeights(model).bytes == 0


def test_decoding_many_rows_finds_what_one_at_a_time_finds(tmp_path):
    """Seven pairs are fourteen rows, with the copies; one pair is two, without."""
    model = tiny_models.save("llama-tied", tmp_path / "llama-tied", intermediate_size=4096)
    common = {"slope": SLOPE, "sampling": {"temperature": 0}, "stopping": {"stop_ids": [], "max_tokens": 8}}
    both = pairs(model.config.vocab_size)
    cases = {str(rows): {"requests": both, "max_rows": rows, **common} for rows in (1, 7)}
    told, found = told_and_found(tmp_path, tmp_path / "llama-tied", "", cases)
    assert any("for packed copies of the weights" in line for line in told)
    assert [got["tokens"] for got in found["1"]] == [got["tokens"] for got in found["7"]]
    for one, other in zip(found["1"], found["7"], strict=True):
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=5e-5)


def multiplied(layers, states):
    column, row = layers
    return row(torch.nn.functional.silu(column(states)[0]))[0]


@pytest.fixture
def megatron_layers(monkeypatch):
    """(what PackedWeights asks of a model, its two layers), on one rank. None is too small."""
    from megatron_idft.inference import packed_weights

    monkeypatch.setattr(packed_weights, "_FEWEST_WEIGHTS", 0)
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        config = TransformerConfig(
            num_layers=1, hidden_size=24, num_attention_heads=1, use_cpu_initialization=True, add_bias_linear=False
        )
        group = distributed.group.WORLD
        settings = {"config": config, "init_method": torch.nn.init.normal_, "bias": False, "tp_group": group}
        column = ColumnParallelLinear(24, 40, gather_output=False, **settings)
        row = RowParallelLinear(40, 24, input_is_parallel=True, skip_bias_add=False, **settings)
        language_model = torch.nn.ModuleList([column, row])
        language_model.share_embeddings_and_output_weights = False
        yield SimpleNamespace(device=torch.device("cpu"), direct=None, language_model=language_model), (column, row)
    finally:
        distributed.destroy_process_group()

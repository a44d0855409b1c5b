"""The kernel for GPUs without flash-attn against float64: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from megatron_idft.inference.paged_attention import paged_attention
from tests.inference.test_blocks import expected
from tests.loss.engines import interpreted

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DEVICES = [pytest.param("cpu", marks=interpreted, id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(6, 2, 32, 16, 3), (4, 4, 24, 16, 9), (14, 2, 64, 16, 20)]
# Those of Qwen3 8B and Qwen2.5 7B, in the engine's own blocks, up to the most parts of a row.
LARGE = [pytest.param(*shape, 64, 160, "cuda", marks=pytest.mark.gpu) for shape in ((32, 8, 128), (28, 4, 128))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "size", "places", "device"),
    [*(pytest.param(*shape, *device.values, marks=device.marks) for shape in SHAPES for device in DEVICES), *LARGE],
)
def test_it_equals_float64(dtype, heads, kv_heads, d, size, places, device):
    """Groups of one, three, four and seven heads; a head size that is no power of two; one part and several."""
    torch.manual_seed(places)
    rows = 4
    blocks = 1 + rows * places
    keys, values = torch.randn(2, blocks, size, kv_heads, d, dtype=dtype)
    query = torch.randn(rows, heads, d, dtype=dtype)
    tables = (1 + torch.randperm(rows * places)).int().view(rows, places)
    lengths = torch.tensor([0, size - 1, size * places // 2, size * places - 1])
    tables[1:, 0] = tables[3, 0]  # shared
    used = [tables[i, : lengths[i] // size + 1].numpy() for i in range(rows)]
    padded = torch.zeros(rows, places + 2, dtype=torch.int32)  # tables are views of wider ones
    padded[:, :places] = tables
    given = (tensor.to(device) for tensor in (query, keys, values, padded))
    query_there, keys_there, values_there, padded_there = given
    found = paged_attention(
        query_there, keys_there, values_there, padded_there[:, :places], lengths.to(device), 0.2
    ).cpu()
    wanted = expected(query.view(rows, kv_heads, -1, d), keys, values, used, lengths.tolist(), 0.2)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(found.flatten(1).double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_positions_beyond_the_length_are_not_read(device):
    keys, values = torch.full((2, 3, 16, 1, 16), torch.nan).to(device)
    keys[1, :5], values[1, :5] = 1.0, 2.0
    tables, lengths = torch.tensor([[1, 2]], dtype=torch.int32).to(device), torch.tensor([4]).to(device)
    found = paged_attention(torch.ones(1, 1, 16).to(device), keys, values, tables, lengths, 1.0)
    assert torch.equal(found.cpu(), torch.full((1, 1, 16), 2.0))

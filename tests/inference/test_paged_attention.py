"""The kernel for GPUs without flash-attn, interpreted on a CPU, against float64."""

import pytest
import torch

from megatron_idft.inference.paged_attention import paged_attention
from tests.inference.test_blocks import expected

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "places"), [(6, 2, 32, 3), (4, 4, 24, 9), (14, 2, 64, 20)])
def test_it_equals_float64(dtype, heads, kv_heads, d, places):
    """Groups of one, three and seven heads; a head size that is no power of two; one part and several."""
    torch.manual_seed(places)
    size, rows = 16, 4
    blocks = 1 + rows * places
    keys, values = torch.randn(2, blocks, size, kv_heads, d, dtype=dtype)
    query = torch.randn(rows, heads, d, dtype=dtype)
    tables = (1 + torch.randperm(rows * places)).int().view(rows, places)
    lengths = torch.tensor([0, size - 1, size * places // 2, size * places - 1])
    tables[1:, 0] = tables[3, 0]  # shared
    used = [tables[i, : lengths[i] // size + 1].numpy() for i in range(rows)]
    padded = torch.zeros(rows, places + 2, dtype=torch.int32)  # tables are views of wider ones
    padded[:, :places] = tables
    found = paged_attention(query, keys, values, padded[:, :places], lengths, 0.2)
    wanted = expected(query.view(rows, kv_heads, -1, d), keys, values, used, lengths.tolist(), 0.2)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(found.flatten(1).double(), wanted, atol=tolerance, rtol=tolerance)


def test_positions_beyond_the_length_are_not_read():
    keys, values = torch.full((2, 3, 16, 1, 16), torch.nan)
    keys[1, :5], values[1, :5] = 1.0, 2.0
    tables, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([4])
    found = paged_attention(torch.ones(1, 1, 16), keys, values, tables, lengths, 1.0)
    assert torch.equal(found, torch.full((1, 1, 16), 2.0))

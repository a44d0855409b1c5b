"""What only the reference backend promises: blocks of rows, and memory and shapes that meta tensors can show."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idft import idft, vocab_parallel_loss
from megatron_idft.loss import reference
from tests.loss.engines import REFERENCE
from tests.loss.intermediate import as_intermediate
from tests.loss.test_vocab_parallel_loss import VIEWS, assert_same_bits


# Blocks within the last dimension, across dimensions, everything at once.
@pytest.mark.parametrize("max_rows", [1, 2, 5, 10**6])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_in_any_block_size(view: str, max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = VIEWS[view](torch.float32)
    labels = torch.randint(-2, 41, logits.shape[:-1])
    expected = REFERENCE.run(logits.contiguous(), labels)
    monkeypatch.setattr(reference, "_max_rows", lambda columns: max_rows)
    assert_same_bits(REFERENCE.run(logits, labels), expected)
    half = VIEWS[view](torch.bfloat16)
    assert_same_bits(REFERENCE.run(half, labels), REFERENCE.run(half.contiguous(), labels))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, by dtype, other than views of `known`."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}
        self.known = known.data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() != self.known:
                self.elements[value.dtype] = max(self.elements.get(value.dtype, 0), value.numel())
        return result


@pytest.mark.parametrize("overwrite_logits", [False, True])
def test_no_tensor_but_the_gradient_has_the_size_of_the_logits(
    overwrite_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_max_rows", lambda columns: 4)
    logits = as_intermediate(torch.randn(16, 8, 50).bfloat16().transpose(0, 1).requires_grad_())
    labels = torch.zeros(8, 16).long()
    with LargestTensor(logits) as largest:
        loss = vocab_parallel_loss(logits, labels, vocab_size=40, overwrite_logits=overwrite_logits).loss.sum()
        torch.autograd.grad(loss, logits)
    if overwrite_logits:
        assert largest.elements[torch.bfloat16] <= labels.numel()  # the target logits
    else:
        assert largest.elements[torch.bfloat16] == logits.numel()
    others = {dtype: elements for dtype, elements in largest.elements.items() if dtype != torch.bfloat16}
    assert max(others.values()) <= max(4 * 50, 4 * labels.numel())  # a block, or the packed state


def test_no_host_synchronisation_on_a_gpu() -> None:
    # Meta tensors take the same path and have no values: reading one on the host, or a shape that depends on values,
    # raises.
    with pytest.raises(NotImplementedError):
        torch.empty(3, device="meta")[torch.empty(3, dtype=torch.bool, device="meta")]
    logits = torch.empty(6, 2, 50, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(6, 2, dtype=torch.int64, device="meta")
    objective = idft(gamma_lambda=torch.empty((), device="meta")).with_weight_floor(0.1).with_exempt_tokens([2])
    out = vocab_parallel_loss(logits, labels, objective, vocab_size=45)
    out.loss.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape
    assert out.invalid_labels.shape == () and out.invalid_labels.dtype == torch.int64

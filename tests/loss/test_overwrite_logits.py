"""overwrite_logits=True: what else happens to the memory, and what is refused.

`Engine.run` in engines.py and `run_shard` in test_tensor_parallel.py compare its values and gradients with those of the
copying mode, in all of their cases.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_idft import Reference, resolve_objective, vocab_parallel_loss
from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.loss.hook import LossHook
from tests.loss.engines import Engine
from tests.loss.intermediate import as_intermediate

SECOND_BACKWARD = "first one overwrote the logits.*overwrite_logits=False"
MODIFIED = "modified (by an )?inplace"


@pytest.fixture(autouse=True)
def on_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call below uses the engine's backend, every new tensor its device."""
    on_backend = functools.partial(vocab_parallel_loss, backend=engine.backend)
    monkeypatch.setitem(globals(), "vocab_parallel_loss", on_backend)
    with torch.device(engine.device):
        yield


def make_inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    leaf = torch.randn(*shape).requires_grad_()
    return leaf, torch.randint(-1, shape[-1], shape[:-1])


def overwriting_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_loss(logits, labels, overwrite_logits=True).loss


def test_the_logits_hold_the_gradient() -> None:
    leaf, labels = make_inputs(6, 9)
    vocab_parallel_loss(leaf, labels).loss.sum().backward()
    logits = as_intermediate(leaf)
    version = logits._version
    overwriting_loss(logits, labels).sum().backward()
    assert leaf.grad is not None and torch.equal(logits * 2, leaf.grad)  # the second backward was added
    assert logits._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_linear_output_layer(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 3, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    labels = torch.randint(-1, 11, (5, 3))
    gradients = []
    for overwrite_logits in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logits = torch.nn.functional.linear(*leaves)
        logits.retain_grad()
        vocab_parallel_loss(logits, labels, overwrite_logits=overwrite_logits).loss.mean().backward()
        gradients.append([logits.grad, *(leaf.grad for leaf in leaves)])
    for copied, overwritten in zip(*gradients, strict=True):
        assert copied is not None and overwritten is not None and torch.equal(copied, overwritten)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda base: base.transpose(0, 1),
    "flat": lambda base: base.view(-1, 20),
    "columns": lambda base: base[..., 3:15],
    "every other row": lambda base: base[::2],
    "vocabulary-major": lambda base: base[0].t(),
    "one of two parts": lambda base: base.split(2)[1],
    "a view of a view": lambda base: base[1:].transpose(0, 1)[..., 1:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_an_intermediate_overwrites_its_part_only(view: str) -> None:
    leaf, _ = make_inputs(4, 3, 20)
    labels = torch.randint(-1, 3, VIEWS[view](leaf).shape[:-1])
    bases, leaf_gradients = [], []
    for overwrite_logits in (False, True):
        bases.append(as_intermediate(leaf))
        loss = vocab_parallel_loss(VIEWS[view](bases[-1]), labels, overwrite_logits=overwrite_logits).loss.sum()
        leaf_gradients += torch.autograd.grad(loss, leaf)
    copying, overwriting = leaf_gradients
    assert torch.equal(copying, overwriting)
    viewed = torch.zeros(leaf.shape, dtype=torch.bool)
    VIEWS[view](viewed).fill_(True)
    assert torch.equal(bases[1], torch.where(viewed, copying, leaf))
    assert torch.equal(bases[0], leaf)


class Identity(torch.autograd.Function):
    """Returns its input itself, which autograd turns into a view."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    "view",
    [lambda leaf: leaf, lambda leaf: leaf.t(), lambda leaf: leaf[:, 1:], lambda leaf: Identity.apply(leaf.view(8, 8))],
)
def test_a_leaf_and_its_views_are_refused(view: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(8, 8, requires_grad=True)
    before, labels = leaf.detach().clone(), torch.zeros(8).long()
    with pytest.raises(ValueError, match=r"would destroy the values of a leaf.*logits\.clone\(\)"):
        overwriting_loss(view(leaf), labels)
    overwriting_loss(view(leaf).clone(), labels).sum().backward()  # the remedy
    assert torch.equal(leaf, before) and leaf.grad is not None and leaf.grad.any()


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[:1].expand(4, 8),
        lambda base: base[:, :1].expand(8, 8),
        lambda base: base.view(-1).unfold(0, 8, 4),  # windows that overlap by half
    ],
)
def test_elements_that_share_memory_are_refused(view: Callable[[Tensor], Tensor]) -> None:
    logits = view(torch.randn(8, 8, requires_grad=True) * 1)
    labels = torch.zeros(logits.shape[0]).long()
    with pytest.raises(ValueError, match=r"memory of their own.*logits\.contiguous\(\)"):
        overwriting_loss(logits, labels)
    overwriting_loss(logits.contiguous(), labels).sum().backward()  # the remedy


def test_dimensions_of_size_1_and_0_share_no_memory() -> None:
    leaf, labels = make_inputs(1, 1, 7)
    overwriting_loss((leaf * 1).as_strided((1, 1, 7), (0, 0, 1)), labels).sum().backward()
    for shape in ((0, 3, 7), (3, 0, 7)):
        leaf, labels = torch.randn(shape, requires_grad=True), torch.zeros(shape[:-1]).long()
        overwriting_loss(leaf * 1, labels).sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == shape


def test_without_gradient_nothing_is_overwritten_or_refused() -> None:
    leaf, labels = make_inputs(6, 9)
    before, logits = leaf.detach().clone(), as_intermediate(leaf)
    overwriting_loss(leaf.detach(), labels)
    overwriting_loss(leaf.detach()[:1].expand(6, 9), labels)
    with torch.no_grad():
        overwriting_loss(leaf, labels)
        overwriting_loss(logits, labels)
    with torch.inference_mode():
        overwriting_loss(leaf.detach(), labels)
    overwriting_loss(logits, labels)  # never sent backward
    assert torch.equal(leaf, before) and torch.equal(logits, before)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_backward_is_refused(retain_graph: bool) -> None:
    leaf, labels = make_inputs(6, 9)
    loss = overwriting_loss(leaf * 1, labels).sum()
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match=SECOND_BACKWARD):
        loss.backward()


def test_the_copying_mode_may_run_backward_twice() -> None:
    leaf, labels = make_inputs(6, 9)
    loss = vocab_parallel_loss(leaf * 1, labels).loss.sum()
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_are_refused() -> None:
    leaf, labels = make_inputs(6, 9)
    (grad,) = torch.autograd.grad(overwriting_loss(leaf * 1, labels).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def soft_cap(leaf: Tensor, labels: Tensor) -> Tensor:
    return overwriting_loss(torch.tanh(leaf), labels).sum()


def soft_cap_seen_through_a_view(leaf: Tensor, labels: Tensor) -> Tensor:
    return overwriting_loss(torch.tanh(leaf).view(2, 3, 9).transpose(0, 1), labels.view(2, 3).t()).sum()


def z_loss_before(leaf: Tensor, labels: Tensor) -> Tensor:
    logits = leaf * 1
    return logits.logsumexp(-1).pow(2).sum() + overwriting_loss(logits, labels).sum()


def two_losses(leaf: Tensor, labels: Tensor) -> Tensor:
    logits = leaf * 1
    return overwriting_loss(logits, labels).sum() + overwriting_loss(logits, labels.flip(0)).sum()


def copying_loss_before(leaf: Tensor, labels: Tensor) -> Tensor:
    logits = leaf * 1
    return vocab_parallel_loss(logits, labels).loss.sum() + overwriting_loss(logits, labels.flip(0)).sum()


def parts_of_one_tensor(leaf: Tensor, labels: Tensor) -> Tensor:
    upper, lower = (leaf * 1).split(3)
    return overwriting_loss(upper, labels[:3]).sum() + overwriting_loss(lower, labels[3:]).sum()


@pytest.mark.parametrize(
    "model",
    [soft_cap, soft_cap_seen_through_a_view, z_loss_before, two_losses, copying_loss_before, parts_of_one_tensor],
)
def test_an_operation_that_still_needs_the_logits_makes_autograd_raise(
    model: Callable[[Tensor, Tensor], Tensor],
) -> None:
    leaf, labels = make_inputs(6, 9)
    with pytest.raises(RuntimeError, match=MODIFIED):
        model(leaf, labels).backward()


def z_loss_after(leaf: Tensor, labels: Tensor, overwrite_logits: bool) -> Tensor:
    logits = leaf * 1
    loss = vocab_parallel_loss(logits, labels, overwrite_logits=overwrite_logits).loss.sum()
    return loss + logits.logsumexp(-1).pow(2).sum()


def sums_of_the_logits(leaf: Tensor, labels: Tensor, overwrite_logits: bool) -> Tensor:
    logits = leaf * 1
    before = (logits * 3).sum()
    return before + vocab_parallel_loss(logits, labels, overwrite_logits=overwrite_logits).loss.sum() + logits.sum()


def checkpointed_soft_cap(leaf: Tensor, labels: Tensor, overwrite_logits: bool) -> Tensor:
    def loss(leaf: Tensor) -> Tensor:
        return vocab_parallel_loss(torch.tanh(leaf), labels, overwrite_logits=overwrite_logits).loss.sum()

    result = checkpoint(loss, leaf, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def soft_cap_under_hooks(leaf: Tensor, labels: Tensor, overwrite_logits: bool) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return vocab_parallel_loss(torch.tanh(leaf), labels, overwrite_logits=overwrite_logits).loss.sum()


def checkpointed_output_layer(leaf: Tensor, labels: Tensor, overwrite_logits: bool) -> Tensor:
    logits = checkpoint(torch.tanh, leaf, use_reentrant=False)
    assert isinstance(logits, Tensor)
    return vocab_parallel_loss(logits, labels, overwrite_logits=overwrite_logits).loss.sum()


@pytest.mark.parametrize(
    "model",
    [z_loss_after, sums_of_the_logits, checkpointed_soft_cap, soft_cap_under_hooks, checkpointed_output_layer],
)
def test_other_uses_of_the_logits_keep_their_gradients(model: Callable[[Tensor, Tensor, bool], Tensor]) -> None:
    leaf, labels = make_inputs(6, 9)
    (expected,) = torch.autograd.grad(model(leaf, labels, False), leaf)
    (actual,) = torch.autograd.grad(model(leaf, labels, True), leaf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def hooked_loss(backend: str, training: bool, watched: bool, is_leaf: bool) -> tuple[Tensor, Tensor]:
    """The logits after the Megatron hook's loss and its backward, and before."""
    leaf, labels = make_inputs(5, 2, 9)
    output_layer = torch.nn.Identity()
    output_layer.output_size_per_partition = 9
    if watched:
        output_layer.register_forward_hook(lambda *args: None)
    model = types.SimpleNamespace(
        compute_language_model_loss=None,
        forward=lambda labels, loss_mask: None,
        output_layer=output_layer,
        pg_collection=types.SimpleNamespace(tp=None),
        training=training,
    )
    hook = LossHook(model, resolve_objective("idft"), None, backend, None)
    labels = labels.t().contiguous()
    hook._capture(inspect.signature(model.forward), (labels, None), {})
    logits = leaf if is_leaf else leaf * 1
    before = logits.detach().clone()
    loss = hook(labels, logits).sum()
    if training:
        loss.backward()
        assert leaf.grad is not None and leaf.grad.any()
    return logits.detach(), before


def test_the_hook_uses_what_it_was_told_of_a_micro_batch_once() -> None:
    """A program that forgets a reference must not train on that of the micro-batch before."""
    model = types.SimpleNamespace(
        compute_language_model_loss=None,
        forward=lambda labels, loss_mask: None,
        output_layer=types.SimpleNamespace(output_size_per_partition=9, _forward_hooks={}),
        pg_collection=types.SimpleNamespace(tp=None),
        training=True,
    )
    hook = LossHook(model, resolve_objective("prift"), None, "reference", None)
    labels = torch.zeros(2, 3, dtype=torch.long)
    told = Reference(torch.full((2, 3), -0.5)), 4, torch.ones(2, 3)
    hook.reference, hook.num_trained, hook.token_factors = told
    for given in (True, False):
        hook._capture(inspect.signature(model.forward), (labels, None), {})
        pairs = zip(hook._pending[0][3:], told if given else (None,) * 3, strict=True)
        assert all(each is wanted for each, wanted in pairs)
        with nullcontext() if given else pytest.raises(UnsupportedModelError, match="came without"):
            hook(labels, torch.zeros(3, 2, 9))


@pytest.mark.parametrize(
    "training,watched,is_leaf,overwritten",
    [(True, False, False, True), (True, True, False, False), (True, False, True, False), (False, False, False, False)],
)
def test_the_hook_overwrites_in_training_what_nobody_reads(
    engine: Engine, training: bool, watched: bool, is_leaf: bool, overwritten: bool
) -> None:
    after, before = hooked_loss(engine.backend, training, watched, is_leaf)
    assert torch.equal(after, before) != overwritten

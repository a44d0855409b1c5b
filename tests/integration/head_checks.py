"""What the fused output head does on one real model, in a process of its own; run by test_fused_head.py."""

import gc
import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.platform import cpu
from tests.integration import head_training
from tests.integration.head_training import BATCH, MTP, PADDED, SEQ, VOCAB, Case

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def run_checks() -> dict[str, str]:
    """What went wrong, by check; "" where nothing did."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    cpu.enable()
    logging.disable(logging.WARNING)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5)
    found = {}
    for name, function in CHECKS.items():
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


def model_of(case: Case = Case(), head: str | None = "fused", wrapped: bool = True) -> Any:  # noqa: B008  frozen
    """The same weights each time; wrapped: in DDP, which keeps main_grad."""
    from megatron_idft import install

    torch.manual_seed(3)
    config = head_training.transformer_config(case)
    model = head_training.wrap(case, config)[0] if wrapped else head_training.build(case, config, 0)
    return model if head is None else install(model, "idft", vocab_size=VOCAB, head=head)


def head_of(model: Any) -> Any:
    from megatron_idft.integration.loss.hook import installed_hooks

    return installed_hooks(model)[0].fused_head


def batch() -> dict[str, torch.Tensor]:
    return head_training.micro_batches(Case(), 0)[0]


def call(model: Any, labels: bool = True) -> torch.Tensor:
    data, causal = batch(), torch.triu(torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool), diagonal=1)
    given = {"labels": data["labels"], "loss_mask": data["loss_mask"]} if labels else {}
    output: torch.Tensor = model(data["tokens"], torch.arange(SEQ).expand(BATCH, SEQ), causal, **given)
    return output


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad).clone()
        for name, parameter in model.named_parameters()
    }


def assert_alike(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], close: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name in got:
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=close * scale + 1e-9, msg=name)


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except UnsupportedModelError as error:
        assert "--sft-loss-head materialized" in str(error), error
        return str(error)
    raise AssertionError("nothing was refused")


@check
def any_loss_function_is_served():
    """One that weighs tokens otherwise than the loss mask does, from the first micro-batch on."""
    weights = torch.linspace(-1, 2, BATCH * SEQ).view(BATCH, SEQ)
    for wrapped in (True, False):
        found = []
        for head in ("materialized", "fused"):
            model = model_of(head=head, wrapped=wrapped)
            for number in range(3):
                (call(model).square() * weights).sum().backward()
                if head == "fused":
                    assert head_of(model).watch.forwards == 1, "from the second micro-batch on in backward"
                    assert head_of(model).gradients_in_forward == (number == 0)
                    head_of(model).end_step()
            found.append(gradients(model))
        assert_alike(found[1], found[0])


@check
def a_common_factor_fits():
    """Autograd's gradients are scaled; what was added to main_grad in fp32 is taken back, once."""
    for wrapped in (True, False):
        found = []
        for head in ("materialized", "fused"):
            model = model_of(head=head, wrapped=wrapped)
            (call(model) * batch()["loss_mask"]).mean().backward()
            found.append(gradients(model))
        assert_alike(found[1], found[0], 1e-4 if wrapped else 1e-6)
        assert head_of(model).watch.fitted is not wrapped


@check
def a_loss_function_that_changes_stops_the_step():
    model = model_of()
    (call(model) * batch()["loss_mask"]).sum().backward()
    head_of(model).end_step()
    call(model).sum().backward()
    assert model.module.output_layer.weight.main_grad.isnan().any(), "nobody may train on it"
    assert "changes its form" in refusal(head_of(model).end_step)


@check
def a_forward_pass_without_its_backward_is_noticed():
    model = model_of()
    call(model)
    gc.collect()
    assert "1 forward passes in training mode had no backward pass" in refusal(lambda: call(model))
    model = model_of()
    kept = call(model)
    assert "no backward pass" in refusal(head_of(model).end_step), "of the last micro-batch too"
    del kept
    model = model_of()
    first, second = call(model), call(model)  # as pipelines do
    (second.sum() + first.sum()).backward()
    del first, second
    (call(model) * batch()["loss_mask"]).sum().backward()
    head_of(model).end_step()


@check
def without_main_grad_a_lost_forward_pass_does_no_harm():
    model = model_of(wrapped=False)
    call(model)
    gc.collect()
    (call(model) * batch()["loss_mask"]).sum().backward()
    assert model.output_layer.weight.grad is not None


@check
def evaluation_adds_nothing():
    wanted = call(model_of(head="materialized").eval()).detach()
    for context in (torch.no_grad(), torch.enable_grad()):
        model = model_of().eval()
        with context:
            torch.testing.assert_close(call(model).detach(), wanted, rtol=1e-5, atol=1e-6)
        assert not any(gradient.any() for gradient in gradients(model).values())
        assert head_of(model).watch.forwards == 0


@check
def without_labels_the_logits_are_the_models():
    assert torch.equal(call(model_of(), labels=False), call(model_of(head=None), labels=False))


class Sizes(TorchDispatchMode):
    """The largest tensor with a vocabulary for its last dimension, but for the weight turned over."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        made = isinstance(found, torch.Tensor) and function is not torch.ops.aten.t.default
        if made and found.dim() and found.shape[-1] == PADDED:
            self.largest = max(self.largest, found.numel())
        return found


@check
def logits_are_never_made():
    from megatron_idft import install

    largest = {}
    for head in ("materialized", "fused"):
        for training in (True, False):
            model = model_of(Case(config={"ffn_hidden_size": 96}), head=None).train(training)
            install(model, vocab_size=VOCAB, head=head, chunk_tokens=4)
            with Sizes() as sizes, torch.set_grad_enabled(training):
                loss = call(model)
                if training:
                    (loss * batch()["loss_mask"]).sum().backward()
            largest[head, training] = sizes.largest
    assert largest["materialized", True] == largest["materialized", False] == BATCH * SEQ * PADDED
    assert largest["fused", True] <= 4 * PADDED and largest["fused", False] <= 4 * PADDED, largest


@check
def what_touches_the_logits_is_refused():
    model = model_of()
    model.module.output_layer.register_forward_hook(lambda module, inputs, output: print(output[0].shape))
    assert "something asked for them" in refusal(lambda: call(model))
    model = model_of()
    scale = model.module._scale_logits
    model.module._scale_logits = lambda logits: torch.tanh(scale(logits))
    assert "a soft cap" in refusal(lambda: call(model))


@check
def layers_that_cannot_be_fused_are_named():
    from megatron_idft import install

    def refused(change: Callable[[Any], object]) -> str:
        model = model_of(head=None, wrapped=False)
        change(model)
        return refusal(lambda: install(model, vocab_size=VOCAB, head="fused"))

    class Quantised(torch.nn.Linear): ...

    changes: dict[str, Callable[[Any], object]] = {
        "a Quantised, not": lambda model: setattr(model, "output_layer", Quantised(2, 2)),
        "already replaced its forward": lambda model: setattr(model.output_layer, "forward", print),
        "hooks on it": lambda model: model.output_layer.register_forward_hook(print),
        "gathers the logits": lambda model: setattr(model.output_layer, "gather_output", True),
        "of experts": lambda model: setattr(model.output_layer, "explicit_expert_comm", True),
        "disable_grad_reduce": lambda model: setattr(model.output_layer, "disable_grad_reduce", True),
        "weight-shards": lambda model: setattr(model.output_layer, "gtp_remat_size", 2),
        "put off": lambda model: setattr(model.config, "defer_embedding_wgrad_compute", True),
        "config_logger_dir": lambda model: setattr(model.config, "config_logger_dir", "x"),
        "autocast": lambda model: setattr(model.config, "enable_autocast", True),
    }
    for reason, change in changes.items():
        assert reason in refused(change), reason
    model = model_of(wrapped=False)
    model.output_layer.weight.__fsdp_param__ = True
    assert "FSDP" in refusal(lambda: call(model))


@check
def the_weight_of_two_uses_keeps_both_gradients():
    """Megatron marks it for tied embeddings without a pipeline only."""
    for case, marked in ((Case(), False), (Case(tied=True), True), (Case(config=MTP), True)):
        model = model_of(case)
        (call(model) * batch()["loss_mask"]).sum().backward()
        layer, embedding = model.module.output_layer, model.module.embedding.word_embeddings
        weight = embedding.weight if case.tied else layer.weight
        assert getattr(weight, "zero_out_wgrad", False) == marked
        assert weight.grad_added_to_main_grad and weight.grad is None


@check
def installing_again_or_another_head_leaves_one_layer():
    from megatron_idft import install, uninstall

    model = model_of(wrapped=False)
    layer = model.output_layer
    install(model, "dft", vocab_size=VOCAB, head="fused")
    uninstall(model)
    assert "forward" not in layer.__dict__
    try:
        install(model, vocab_size=VOCAB, head="faster")
        raise AssertionError("an unknown head was taken")
    except ValueError as error:
        assert "materialized, fused" in str(error)

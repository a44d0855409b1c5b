"""Builds real Megatron models on one process and checks the hook on them; run by test_hook.py under several versions.

`hook_probe.py engine`: of Transformer Engine's layers, in tests/te. The last line it prints is one JSON object of what
was found.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable

import torch

from megatron_idft.integration.platform import compatibility, cpu

# The repairs of 0.20's models are among the trainer's.
cpu.enable(trainer=compatibility.megatron_version() >= (0, 20))

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: E402
from megatron.core.package_info import __version__  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_idft import install, uninstall  # noqa: E402
from megatron_idft.integration.loss.metrics import LossMetrics  # noqa: E402

VOCAB, PADDED, SEQ, BATCH = 50, 64, 12, 3
ENGINE = sys.argv[1:] == ["engine"]


def build_gpt(mtp: bool, **settings: object) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mtp_num_layers=1 if mtp else None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        attention_backend=AttnBackend.unfused if ENGINE else AttnBackend.auto,  # the only one without a kernel
    )
    specs = gpt_layer_specs
    spec = (specs.get_gpt_layer_with_transformer_engine_spec if ENGINE else specs.get_gpt_layer_local_spec)()
    extra = {"mtp_block_spec": specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=ENGINE)} if mtp else {}
    return GPTModel(
        config, spec, vocab_size=PADDED, max_sequence_length=SEQ, position_embedding_type="rope", **extra, **settings
    )


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    trained = torch.rand(BATCH, SEQ, generator=generator) > 0.4
    weights = torch.tensor([1.0, -0.5, 2.0])[torch.randint(0, 3, (BATCH, SEQ), generator=generator)]  # of the turns
    loss_mask = torch.where(trained, weights, 0.0)
    causal = torch.triu(torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool), diagonal=1)
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "attention_mask": causal}


def call(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> torch.Tensor:
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    return model(data["tokens"], positions, data["attention_mask"], labels=data["labels"], loss_mask=data["loss_mask"])


def gradients(model: torch.nn.Module, loss: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss * mask).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_logits(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    caught = []

    def keep(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        caught.append(output[0])
        return (output[0].clone(), *output[1:])  # the stock cross-entropy overwrites fp32 logits in place

    handle = model.output_layer.register_forward_hook(keep)
    loss = call(model, data)
    handle.remove()
    return loss, caught[-1]  # the main head is the last to call it


def expected(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Independent of the library: IDFT's weight and cross-entropy over the true vocabulary, by autograd."""
    _, logits = loss_and_logits(model, data)
    log_probs = logits[..., :VOCAB].transpose(0, 1).double().log_softmax(-1)
    log_prob = log_probs.gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    gamma = torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0)
    weight = torch.exp(gamma * log_prob).detach()
    return {"ce": -log_prob, "loss": -weight * log_prob, "weight": weight, "phi": log_prob + entropy}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(((a[k] - b[k]).abs().max() / (b[k].abs().max() + 1e-12)).item() for k in a)


def measure(mtp: bool, backend: str = "auto", head: str = "materialized") -> dict[str, float | int | bool]:
    torch.manual_seed(3)
    model = build_gpt(mtp).train()
    data, mask = batch(), batch()["loss_mask"]
    original_method = model.compute_language_model_loss
    stock = call(model, data)
    stock_gradients = gradients(model, stock, mask)
    want = expected(model, data)

    metrics = LossMetrics(torch.device("cpu"), end_of_turn_ids=(5,), gamma_limits=(0.1, 2.0))
    assert install([model], "idft", vocab_size=VOCAB, metrics=metrics) == [model]
    settings = {"vocab_size": VOCAB, "backend": backend, "head": head}
    install([model], "idft", metrics=metrics, **settings)  # again: replaces, never stacks
    metrics.begin_step()
    got = call(model, data)
    got_gradients = gradients(model, got, mask)
    metrics.commit_step()
    report = metrics.report(None, 1.0)

    # With autograd on an independent graph: the trained gradient of the main head, plus MTP's own if there is one.
    model.zero_grad()
    uninstall(model)
    graph = expected_with_graph(model, data, mask)
    install(model, "idft", **settings)
    model.eval()
    evaluated = call(model, data)
    uninstall([model])
    model.train()
    again = call(model, data)
    trained = mask != 0
    return {
        "values are cross-entropy": (got - want["ce"])[trained].abs().max().item(),
        "untrained values": got[~trained].abs().max().item(),
        "evaluation is cross-entropy": (evaluated - want["ce"])[trained].abs().max().item(),
        "gradient is the objective's": largest_difference(got_gradients, graph),
        "gradient differs from stock": largest_difference(got_gradients, stock_gradients),
        "micro-batches": report.micro_batches,
        "tokens": report.scalars["trained tokens"] - trained.sum().item(),
        "lm loss": report.lm_loss - (want["ce"] * mask).sum().item() / trained.sum().item(),
        "phi mean": report.scalars["ddt/phi mean"] - want["phi"][trained].mean().item(),
        "phi std": report.scalars["ddt/phi std"] - want["phi"][trained].std(unbiased=False).item(),
        "sft loss": report.scalars["sft loss"] - want["loss"][trained].mean().item(),
        "weight mean": report.scalars["sft weight mean"] - want["weight"][trained].mean().item(),
        "restored": bool((again == stock).all()) and model.compute_language_model_loss == original_method,
        "attributes left": sum("idft" in key for key in model.__dict__) + ("forward" in model.output_layer.__dict__),
    }


def expected_with_graph(
    model: torch.nn.Module, data: dict[str, torch.Tensor], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of sum(mask * -w log p) for the stock model, and of MTP's own loss where the model has it."""
    stock_loss, logits = loss_and_logits(model, data)
    log_probs = logits[..., :VOCAB].transpose(0, 1).double().log_softmax(-1)
    log_prob = log_probs.gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    weight = torch.exp(torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0) * log_prob).detach()
    # 0 * stock_loss keeps MTP's auxiliary gradient, which hangs on the hidden states, in the graph.
    loss = -(weight * log_prob * mask).sum() + 0.0 * stock_loss.sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refusals() -> dict[str, str]:
    """What the hook says where it cannot serve; empty where it wrongly says nothing."""
    messages = {}

    def attempt(name: str, action: Callable[[], object]) -> None:
        try:
            action()
            messages[name] = ""
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"

    data = batch()
    attempt("no language model", lambda: install(torch.nn.Linear(2, 2)))

    model = build_gpt(mtp=False)
    model.config.cross_entropy_loss_fusion = True
    attempt("fused cross-entropy", lambda: install(model))

    model = build_gpt(mtp=False)
    model.fp16_lm_cross_entropy = True
    attempt("fp16 cross-entropy", lambda: install(model))

    model = build_gpt(mtp=False)
    model.compute_language_model_loss = lambda labels, logits: logits
    attempt("already replaced", lambda: install(model))

    model = install(build_gpt(mtp=False), vocab_size=VOCAB)
    logits = torch.zeros(SEQ, BATCH, PADDED)
    attempt("called outside forward", lambda: model.compute_language_model_loss(data["labels"], logits))
    model.output_layer.output_size_per_partition = PADDED // 2
    attempt("gathered logits", lambda: call(model, data))
    model.output_layer.output_size_per_partition = PADDED
    attempt("label out of range", lambda: call(model, {**data, "labels": data["labels"] + VOCAB}))

    model = build_gpt(mtp=False)
    model._postprocess = lambda *args, **kwargs: torch.zeros(())
    install(model)
    attempt("loss computed elsewhere", lambda: call(model, data))
    return messages


def without_mask() -> dict[str, float]:
    """A caller that passes no loss_mask is trained on every label, and gets no metrics."""
    torch.manual_seed(3)
    model, data = build_gpt(mtp=False).train(), batch()
    metrics = LossMetrics(torch.device("cpu"))
    install(model, "dft", vocab_size=VOCAB, metrics=metrics)
    full = call(model, {**data, "loss_mask": torch.ones(BATCH, SEQ)})
    metrics.begin_step()
    loss = call(model, {**data, "loss_mask": None})
    metrics.commit_step()
    report = metrics.report(None, 1.0)
    return {
        "difference": (loss - full).abs().max().item(),
        "unmasked micro-batches": report.unmasked_micro_batches,
        "tokens": report.scalars["trained tokens"],
    }


def wrapped() -> dict[str, bool]:
    """Chunks wrapped for mixed precision and data parallelism are reached through their wrappers."""
    from megatron.core.transformer.module import Float16Module

    model = build_gpt(mtp=False)
    model.config.bf16 = True
    wrapper = Float16Module(model.config, model)
    loss_before = model.compute_language_model_loss
    install([wrapper], "idft", vocab_size=VOCAB)
    installed = model.compute_language_model_loss != loss_before
    data = batch()
    loss = wrapper(
        data["tokens"],
        torch.arange(SEQ).expand(BATCH, SEQ),
        data["attention_mask"],
        labels=data["labels"],
        loss_mask=data["loss_mask"],
    )
    uninstall([wrapper])
    return {
        "installed": installed,
        "fp32 values from bf16 logits": loss.dtype == torch.float32 and bool(loss.isfinite().all()),
        "uninstalled": model.compute_language_model_loss == loss_before,
    }


def fp32_logits() -> dict[str, object] | None:
    """A bf16 model whose output layer gives fp32, where this Megatron can; its GEMM is Transformer Engine's."""
    if "logit_dtype" not in inspect.signature(GPTModel).parameters:
        return None
    from megatron.core.extensions import transformer_engine

    def gemm(weight, tokens, out_dtype, layout, bias):
        assert layout == "TN" and bias is None
        return [tokens.to(out_dtype) @ weight.to(out_dtype).T]

    transformer_engine.te_general_gemm = gemm
    model = build_gpt(mtp=False, logit_dtype=torch.float32).bfloat16().train()
    data, caught = batch(), []

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (loss * data["loss_mask"]).sum().backward()
        return model.output_layer.weight.grad.float()

    logits = model(data["tokens"], torch.arange(SEQ).expand(BATCH, SEQ), data["attention_mask"])
    log_probs = logits[..., :VOCAB].log_softmax(-1)
    log_prob = log_probs.gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    weight = torch.exp(torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0) * log_prob).detach()
    wanted = gradient(-weight * log_prob)
    install(model, "idft", vocab_size=VOCAB)
    hook, parts = model._megatron_idft_hook, model.output_layer.forward
    model.output_layer.forward = lambda *args, **kwargs: caught.append(parts(*args, **kwargs)) or caught[-1]
    loss = call(model, data)
    values, before = loss.detach(), caught[-1][0]
    got = gradient(loss)
    assert hook.calls == 1
    return {
        "type": str(before.dtype),
        "overwritten": not torch.equal(before.detach().transpose(0, 1)[..., :VOCAB], logits.detach()[..., :VOCAB]),
        "values are cross-entropy": ((values + log_prob) * data["loss_mask"]).abs().max().item(),
        "gradient is the objective's": ((got - wanted).abs().max() / wanted.abs().max()).item(),
    }


def schedule_plan(head: str) -> dict[str, float]:
    """`--overlap-moe-expert-parallel-comm` builds schedule plans, which bypass `forward`.

    They need CUDA streams, so here only their bookkeeping runs, on dense layers: enough to show that the hook gets each
    micro-batch's own labels and mask, also when the next plan is built before the last one ran.
    """
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
    from megatron.core.pipeline_parallel.utils import set_streams

    class NoEvent:
        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def record(self, *args: object) -> None: ...
        def wait(self, *args: object) -> None: ...

    torch.cuda.Event = NoEvent
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: None
    set_streams()
    model = install(build_gpt(mtp=False).train(), "idft", vocab_size=VOCAB, head=head)
    caught = []
    model.output_layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].detach().clone()))
    batches = [batch(), batch()]
    batches[1]["labels"] = batches[1]["labels"].flip(1)
    batches[1]["loss_mask"] = batches[1]["loss_mask"].flip(1)
    plans = [
        model.build_schedule_plan(
            data["tokens"],
            torch.arange(SEQ).expand(BATCH, SEQ),
            data["attention_mask"],
            labels=data["labels"],
            loss_mask=data["loss_mask"],
        )
        for data in batches
    ]
    worst = 0.0
    for data, plan in zip(batches, plans, strict=True):
        loss = TransformerModelChunkSchedulePlan.run(plan, None)
        log_probs = (caught[-1] @ model.output_layer.weight[:VOCAB].T).transpose(0, 1).log_softmax(-1)
        cross_entropy = -log_probs.gather(-1, data["labels"].unsqueeze(-1)).squeeze(-1) * (data["loss_mask"] != 0)
        worst = max(worst, (loss - cross_entropy).abs().max().item())
    return {"difference": worst, "plans": len(caught)}


def main() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(11)
    found = {
        "version": __version__,
        "gpt": measure(mtp=False),
        "gpt with mtp": measure(mtp=True),
        "gpt on the triton backend": measure(mtp=False, backend="triton"),
        "gpt with the fused head": measure(mtp=False, head="fused"),
        "gpt with mtp and the fused head": measure(mtp=True, head="fused"),
        "refusals": refusals(),
        "without mask": without_mask(),
        "wrapped": wrapped(),
    }
    found["fp32 logits"] = fp32_logits()
    if not __version__.startswith(("0.17", "0.18")):
        # Last: they stub streams for good.
        found["schedule plans"] = [schedule_plan(head) for head in ("materialized", "fused")]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

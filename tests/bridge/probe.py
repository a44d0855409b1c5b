"""What Megatron-Bridge does on a CPU with this package: probe.py FOLDER writes FOLDER/CASE.json.

FOLDER/model is a small model in Hugging Face's form, FOLDER/batch.pt one of its batches.
Megatron is imported in CPU mode, with Transformer Engine hidden, so layers and optimizer are the local ones; then
Transformer Engine is shown again, which Megatron-Bridge imports for the classes that its adapters wrap.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
MEGATRON = (
    "megatron.training.training",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.hybrid.hybrid_model",
)
# No kernels of Transformer Engine, apex or CUDA.
LOCAL = """
    gradient_accumulation_fusion apply_rope_fusion masked_softmax_fusion persist_layer_norm bias_dropout_fusion
    bias_activation_fusion moe_permute_fusion
"""
VOCABULARY, LENGTH = 257, 32


def enable() -> None:
    import torch

    from megatron_idft.integration.platform import cpu

    cpu.enable()
    for name in MEGATRON:
        importlib.import_module(name)
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
    # As training/initialize.py of Megatron, from which it is taken, it asserts a GPU before it does anything.
    start, cuda = ("megatron.bridge.training.initialize",), torch.cuda
    cuda.is_available = cpu._to_callers(start, lambda: True, cuda.is_available)
    cuda.device_count = cpu._to_callers(start, lambda: 1, cuda.device_count)
    bridge: Any = importlib.import_module("megatron.bridge")
    importlib.import_module("megatron.bridge.training.finetune")
    bridge.AutoBridge.to_megatron_provider = _local(bridge.AutoBridge.to_megatron_provider)
    adapters: Any = importlib.import_module("megatron.bridge.peft.utils")
    adapters.HAVE_TE = False  # Megatron has no layers of Transformer Engine here


def _local(to_megatron_provider: Any) -> Any:
    from megatron.bridge.models.gpt_provider import local_layer_spec

    def to_local_provider(*args: Any, **kwargs: Any) -> Any:
        provider = to_megatron_provider(*args, **kwargs)
        provider.transformer_layer_spec = local_layer_spec
        provider.use_cpu_initialization = True
        for name in LOCAL.split():
            assert hasattr(provider, name)
            setattr(provider, name, False)
        return provider

    return to_local_provider


def recipe(folder: Path, objective: str | None, metrics: Any = None) -> Any:
    """docs/megatron_bridge.md's."""
    from megatron.bridge import AutoBridge

    from megatron_idft import install

    provider = AutoBridge.from_hf_pretrained(str(folder)).to_megatron_provider()
    provider.cross_entropy_loss_fusion = False
    provider.calculate_per_token_loss = True
    if objective is not None:
        provider.register_pre_wrap_hook(partial(install, objective=objective, vocab_size=VOCABULARY, metrics=metrics))
    provider.seq_length = LENGTH
    return provider


def train(folder: Path, name: str, objective: str | None, peft: Any = None) -> dict[str, Any]:
    """Three steps by Megatron-Bridge's own loop and forward_step: `lm loss` of each, and what the hook met."""
    import torch
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    from megatron_idft.integration.loss.hook import installed_hooks
    from megatron_idft.integration.loss.metrics import LossMetrics

    found: dict[str, Any] = {"lm loss": [], "hooks": 0}

    metrics = None if objective is None else LossMetrics(torch.device("cpu"))

    class Watch(Callback):
        def on_train_step_start(self, context: Any) -> None:
            if metrics is not None:
                metrics.begin_step()

        def on_train_step_end(self, context: Any) -> None:
            found["lm loss"].append(float(context.loss_dict["lm loss"]))
            hooks = installed_hooks(context.model)
            found["hooks"], found["calls"] = len(hooks), sum(hook.calls for hook in hooks)
            if metrics is not None:
                metrics.commit_step()
                group = torch.distributed.group.WORLD
                found["unmasked"] = metrics.report(group, 1.0).unmasked_micro_batches
            parameters = [(n, p) for chunk in context.model for n, p in chunk.named_parameters()]
            found["trained"] = sum(p.requires_grad for _, p in parameters)
            found["parameters"] = len(parameters)
            found["norm"] = float(sum((p.detach().double() ** 2).sum() for _, p in parameters if p.requires_grad))

    finetune(
        _config(folder, name, recipe(folder / "model", objective, metrics), peft), forward_step, callbacks=[Watch()]
    )
    return found


def _lora() -> Any:
    from megatron.bridge.peft.lora import LoRA

    return LoRA(dim=4, alpha=8)


def _config(folder: Path, name: str, provider: Any, peft: Any) -> Any:
    from megatron.bridge.training import config
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return config.ConfigContainer(
        model=provider,
        train=config.TrainingConfig(train_iters=3, global_batch_size=2, micro_batch_size=1),
        validation=config.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=0.0, bf16=False, fp16=False, use_distributed_optimizer=False
        ),
        scheduler=config.SchedulerConfig(
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=3,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=config.MockGPTDatasetConfig(
            seq_length=LENGTH,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            dataloader_type="single",
            skip_getting_attention_mask_from_dataset=False,
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1),
        checkpoint=config.CheckpointConfig(
            pretrained_checkpoint=str(folder / "model"), save=str(folder / name), save_interval=1000
        ),
        rng=config.RNGConfig(seed=1),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
        peft=peft,
        mixed_precision=None,
    )


def gradients(folder: Path) -> dict[str, Any]:
    """The hook on a model that Megatron-Bridge has built and loaded, without and with its LoRA, against autograd."""
    import torch
    from megatron.bridge.peft.lora import LoRA

    from megatron_idft import install, uninstall

    provider = recipe(folder / "model", "idft")
    provider.finalize()
    torch.distributed.init_process_group("gloo")
    provider.initialize_model_parallel(seed=0)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, bf16=False)
    batch = torch.load(folder / "batch.pt")
    tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    attention = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    found: dict[str, Any] = {}

    def values_and_gradients(hooked: bool) -> tuple[Any, list[Any]]:
        model.zero_grad()
        if hooked:
            losses = model(tokens, positions, attention, labels=labels, loss_mask=mask)
        else:
            log_probs = model(tokens, positions, attention)[..., :VOCABULARY].double().log_softmax(-1)
            log_prob = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            weight = torch.exp(torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0) * log_prob).detach()
            losses = -weight * log_prob
        (losses * mask).sum().backward()
        return losses.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def compare(name: str) -> None:
        values, hooked = values_and_gradients(True)
        uninstall(model)
        _, plain = values_and_gradients(False)
        install(model, "idft", vocab_size=VOCABULARY)
        difference = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(hooked, plain, strict=True)
        )
        found[name] = {"gradients": difference, "count": len(hooked), "values": values.tolist()}

    compare("whole")
    LoRA(dim=4, alpha=8)([model])
    # Adapters start at zero; now they take part.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    compare("lora")
    found["lora"]["names"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return found


def conversion(folder: Path) -> dict[str, Any]:
    """What `convert` calls for a family without a table, there and back, on one whose layers are local here."""
    import torch
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    from megatron_idft.checkpoint import bridge
    from megatron_idft.errors import UnknownFamilyError

    torch.distributed.init_process_group("gloo")  # it would take NCCL
    source, there, back = folder / "model", folder / "by-bridge", folder / "back"
    bridge.to_megatron(source, there, UnknownFamilyError("a family without a table"))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    bridge.to_hf(there, back, source, UnknownFamilyError("a family without a table"))
    first, second = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (source, back))
    return {"same": first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)}


def main(folder: Path, *cases: str) -> None:
    """Each case in a fork of its own: Megatron-Bridge takes long to import, and keeps a state of the process."""
    enable()
    for number, case in enumerate(cases or CASES):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(int(os.environ.get("FIRST_PORT", "29600")) + number)
        child = os.fork()
        if not child:
            (folder / f"{case}.json").write_text(json.dumps(CASES[case](folder)))
            for process in multiprocessing.active_children():  # checkpoints' managers: nothing ends them after _exit
                process.kill()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{case} has failed")


CASES = {
    "gradients": gradients,
    "conversion": conversion,
    "none": lambda folder: train(folder, "none", None),
    "ce": lambda folder: train(folder, "ce", "ce"),
    "idft": lambda folder: train(folder, "idft", "idft"),
    "lora": lambda folder: train(folder, "lora", "idft", peft=_lora()),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

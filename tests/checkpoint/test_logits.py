"""Megatron, loading converted checkpoints with its own code in real processes, computes what transformers does."""

import json
from pathlib import Path

import torch

from tests.launch import ROOT, forked

DENSE = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]
MOE = ["qwen3_moe", "qwen3_moe-raw"]


def run(converted, folder: Path, layout: str, nproc: int, cases: dict[str, tuple[str, list[str]]]) -> str:
    """Compute each case (model, flags) in one launch and compare; the log of Megatron."""
    lines = {name: {"flags": flags, "vocab": converted[model].vocab} for name, (model, flags) in cases.items()}
    (folder / "cases.json").write_text(json.dumps(lines))
    script = ROOT / "tests" / "checkpoint" / "logits.py"
    log = forked([script, folder / "cases.json", folder, *layout.split()], nproc=nproc)
    assert "load_return" not in log, "Megatron found keys missing and went on without"
    for name, (model, _) in cases.items():
        want, got = converted[model].logits, torch.load(folder / f"{name}.pt")
        vocab = want.shape[-1]
        assert want.std() > 0.5, "logits that are all alike would prove nothing"
        torch.testing.assert_close(
            got[..., :vocab], want, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert not got[..., vocab:].any(), "padding rows are zeros"
    return log


def plain(converted, names: list[str], classes=("gpt", "hybrid")) -> dict[str, tuple[str, list[str]]]:
    return {
        f"{name}.{kind}": (name, [*converted[name].flags(kind), "--load", str(folder)])
        for name in names
        for kind, folder in converted[name].megatron.items()
        if kind in classes
    }


def without(flags: list[str], *dropped: str) -> list[str]:
    """`flags` without these and their values."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        dropping = word in dropped if word.startswith("--") else dropping
        if not dropping:
            kept.append(word)
    return kept


def test_one_process_and_every_way_of_loading(converted, tmp_path):
    cases = plain(converted, DENSE + MOE)
    qwen = converted["qwen3"]
    gpt, hybrid = str(qwen.megatron["gpt"]), qwen.flags("hybrid")
    cases["finetune"] = ("qwen3", [*qwen.flags("gpt"), "--load", gpt, "--finetune"])
    cases["pretrained"] = ("qwen3", [*qwen.flags("gpt"), "--pretrained-checkpoint", gpt])
    # What --use-checkpoint-args restores need not be given; Megatron 0.19 restores neither of the two that are.
    rest = ["--norm-epsilon", "1e-5", "--qk-layernorm"]
    for kind, folder in qwen.megatron.items():
        cases[f"arguments.{kind}"] = ("qwen3", ["--use-checkpoint-args", "--load", str(folder), *rest])
    # Megatron's own bridge between its two model classes.
    cases["gpt into hybrid"] = ("qwen3", [*hybrid, "--load", gpt])
    moe = converted["qwen3_moe"]
    cases["moe gpt into hybrid"] = ("qwen3_moe", [*moe.flags("hybrid"), "--load", str(moe.megatron["gpt"])])
    run(converted, tmp_path, "", 1, cases)


def test_tensor_parallel_at_any_padded_vocabulary(converted, tmp_path):
    cases = plain(converted, DENSE + MOE)
    for name in ("qwen3", "llama-tied"):  # padded to 128 x 2 by Megatron, and to 3 x 2: more and fewer rows than stored
        flags = without(converted[name].flags("gpt"), "--padded-vocab-size")
        flags += ["--vocab-size", str(converted[name].vocab), "--load", str(converted[name].megatron["gpt"])]
        for multiple in (128, 3):
            cases[f"{name} padded by {multiple}"] = (name, [*flags, "--make-vocab-size-divisible-by", str(multiple)])
    run(converted, tmp_path, "--tensor-model-parallel-size 2", 2, cases)


def test_pipeline_parallel(converted, tmp_path):
    run(converted, tmp_path, "--pipeline-model-parallel-size 2", 2, plain(converted, DENSE + MOE))


def test_virtual_pipeline_parallel(converted, tmp_path):
    layout = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    run(converted, tmp_path, layout, 2, plain(converted, ["llama", "qwen2", "qwen3_moe"], ["gpt"]))


def test_expert_parallel(converted, tmp_path):
    layout = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
    run(converted, tmp_path, layout, 2, plain(converted, MOE))

"""The real Transformer Engine under this package, with torch in the place of its kernels: *emulated* in support.md.

Its modules, autograd functions, checks and optimizer are its own; kernels.py has what computes. All tests are in one
file, so that one process imports it (running.py).
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_idft.checkpoint.convert import to_hf
from tests import tiny_models
from tests.checkpoint.conftest import converted  # noqa: F401  a fixture
from tests.checkpoint.test_round_trip import assert_same
from tests.inference import test_engine
from tests.integration import test_hook, test_packed_training
from tests.integration.test_packed_training import COMPARED, SEQ_LENGTH, load_scalars
from tests.launch import ROOT, forked
from tests.run_outputs import load_weights
from tests.te.running import PYTHON, Machine
from tests.tiny_tokenizers import train_tokenizer

HERE = Path(__file__).parent


pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="Transformer Engine was not run: bash tests/te/environment.sh makes its environment"
)


@pytest.fixture(scope="module")
def machine():
    running = Machine()
    yield running
    running.close()


def told(output: str) -> Any:
    """The JSON of a program's last line, before machine.py's own."""
    return json.loads(output.splitlines()[-2])


def kernels(output: str) -> set[str]:
    """Those that a program has called."""
    return set(json.loads(output.splitlines()[-1])["kernels"])


def attention(output: str) -> dict[str, Any]:
    """What a program has asked for when it last chose a kernel of attention."""
    return json.loads(output.splitlines()[-1])["attention"]


# ----------------------------------------------------------------------------------------------------------- emulation


def test_replaced_kernels_compute_the_documented_formulas(machine):
    found = told(machine.run([HERE / "kernel_checks.py"]))
    print(found)
    assert not found["untried"], "each is compared"
    for name, difference in found["differences"].items():
        assert difference < 3e-6, (name, difference)


# ----------------------------------------------------------------------------------------------------------- hook


@pytest.fixture(scope="module")
def hooked(machine):
    return told(machine.run([ROOT / "tests" / "integration" / "hook_probe.py", "engine"]))


@pytest.mark.parametrize("model", ["gpt", "gpt with mtp"])
def test_the_hook_reaches_models_of_its_layers(hooked, model):
    test_hook.test_values_are_cross_entropy_and_gradients_the_objectives(hooked, model)
    test_hook.test_uninstall_restores_the_model(hooked, model)


# --------------------------------------------------------------------------------------------------------- checkpoints


def parts(folder: Path) -> set[str]:
    """Names of a checkpoint's tensors and objects of the model."""
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name for name in names if name.startswith(("embedding.", "decoder.", "output_layer."))}


def test_converted_checkpoints_load_compute_and_come_back_to_the_bit(machine, converted, tmp_path):  # noqa: F811
    cases, sources = {}, {}
    for name, model in converted.items():
        for kind, folder in model.megatron.items():
            for grouped in (False, True) if "moe" in name else (False,):
                case = f"{name}.{kind}{'.grouped' * grouped}"
                flags = [*model.flags(kind), "--load", str(folder), *["--moe-grouped-gemm"] * grouped]
                cases[case] = {"flags": flags, "vocab": model.vocab, "save": str(tmp_path / case)}
                sources[case] = (model, folder)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    output = machine.run([ROOT / "tests" / "checkpoint" / "logits.py", tmp_path / "cases.json", tmp_path])
    assert {"generic_gemm", "te_general_grouped_gemm", "rmsnorm_fwd", "fused_rope_forward"} <= kernels(output)
    for case, (model, folder) in sources.items():
        got = torch.load(tmp_path / f"{case}.pt")[..., : model.vocab]
        torch.testing.assert_close(got, model.logits, rtol=0, atol=2e-5, msg=lambda m, c=case: f"{c}: {m}")
        saved, ours = map(parts, (tmp_path / case / "iter_0000001", folder / "release"))
        assert saved <= ours and any("linear_qkv._extra_state" in name for name in saved), case
        # What the converter writes besides is read by other layers, and by attention in FP8.
        others = ("core_attention._extra_state", "decoder.layers.mlp.linear_fc1.layer_norm_weight")
        assert all(any(other in name for other in others) for name in ours - saved), case
        shutil.copytree(folder / "tokenizer", tmp_path / case / "tokenizer")  # as `train` does; config.json is in it
        to_hf(tmp_path / case, tmp_path / f"{case}.back", progress=False)
        assert_same(model.huggingface, tmp_path / f"{case}.back")


# ------------------------------------------------------------------------------------------------------------ training


# Positions of documents that make four packs, also where each is padded to a multiple of four for two ranks.
PACKS = [(18, 10), (23, 8), (11, 12, 5), (30,)]
ONE_BY_ONE = "--global-batch-size 8 --micro-batch-size 8"
PACKED = "--global-batch-size 4 --micro-batch-size 1 --sft-packing"


@pytest.fixture(scope="module")
def corpus(machine, tmp_path_factory) -> Path:
    """Records, a tokenizer, models of Hugging Face."""
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(folder)
    (folder / "records.jsonl").write_text("\n".join(test_packed_training.records(3, PACKS)) + "\n")
    for model in ("qwen2", "qwen3", "qwen3_moe"):
        tiny_models.save(model, folder / model)
    return folder


def command(corpus: Path, folder: Path, flags: str, data: str = "records.jsonl") -> list[str]:
    """All records in each of three steps."""
    words = f"--sft-data {corpus / data} --seq-length {SEQ_LENGTH} --train-iters 3 --lr 1e-3 --lr-decay-style constant"
    words += f" --log-interval 1 --sft-loss idft --chat-template chatml --tokenizer-model {corpus / 'tokenizer.model'}"
    words += f" --save {folder} --tensorboard-dir {folder / 'tensorboard'} {flags}"
    return ["-m", "megatron_idft", "train", *words.split()]


@pytest.fixture(scope="module")
def model_flags(corpus):
    def flags(model: str) -> str:
        found = f"--hf-model {corpus / model} --hf-cache {corpus / 'cache'}"
        if model == "qwen2":
            found += " --hybrid-layer-pattern *-*-*-*-"
        if model == "qwen3_moe":
            found += " --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
        return found

    return flags


@pytest.fixture(scope="module")
def local(corpus, model_flags, tmp_path_factory):
    """Model -> the training on local layers and with torch's optimizer, the documents one by one."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp("local")
            forked(command(corpus, made[model], f"{ONE_BY_ONE} {model_flags(model)}"))
        return made[model]

    return run


def assert_same_training(reference: Path, folder: Path) -> None:
    expected, got = load_scalars(reference / "tensorboard"), load_scalars(folder / "tensorboard")
    for key in COMPARED:
        for step, value in expected[key].items():
            close = {"rtol": 2e-5, "atol": 1e-6, "msg": lambda m, k=key, s=step: f"{k}, {s}: {m}"}
            torch.testing.assert_close(got[key][step], value, **close)
    weights = load_weights(folder, 3)
    for name, value in load_weights(reference, 3).items():
        if name not in weights:  # GPTModel's local expert layers name their norm after the layer that it comes before
            name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        # As in test_packed_training.py: Adam moves a weight without a gradient by rounding noise.
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("model", "flags", "ranks"),
    [
        ("qwen3", ONE_BY_ONE, 1),
        ("qwen2", PACKED, 1),
        ("qwen3_moe", f"{PACKED} --moe-grouped-gemm", 1),
        ("qwen3", f"{PACKED} --tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("qwen3", f"{PACKED} --context-parallel-size 2", 2),
        ("qwen3", f"{PACKED} --pipeline-model-parallel-size 2", 2),
        ("qwen3_moe", f"{PACKED} --moe-grouped-gemm --expert-model-parallel-size 2", 2),
    ],
)
def test_training_equals_that_of_local_layers(machine, corpus, model_flags, local, tmp_path, model, flags, ranks):
    output = machine.run(command(corpus, tmp_path, f"{flags} {model_flags(model)}"), nproc=ranks)
    assert {"generic_gemm", "rmsnorm_bwd", "fused_rope_backward", "multi_tensor_adam"} <= kernels(output)
    choice = attention(output)
    if PACKED in flags:
        assert choice["qkv_layout"] == "thd_thd_thd" and choice["attn_mask_type"] == "padding_causal"
        assert not choice["pad_between_seqs"], "documents' padding is a part of them"
    assert choice["context_parallel"] == ("--context-parallel-size" in flags)
    assert_same_training(local(model), tmp_path)


def test_training_in_bf16_is_that_in_fp32_but_for_rounding(machine, corpus, model_flags, local, tmp_path):
    """bf16 keeps eight bits: a rounding is off by 2^-9 at most. Some ten in a row are allowed."""
    machine.run(command(corpus, tmp_path, f"{PACKED} --bf16 {model_flags('qwen3')}"))
    expected, got = (load_scalars(folder / "tensorboard") for folder in (local("qwen3"), tmp_path))
    for key in ("lm loss", "sft loss", "ddt/entropy", "grad-norm", "trained tokens"):
        values = [[found[key][step] for step in sorted(expected[key])] for found in (got, expected)]
        np.testing.assert_allclose(*values, rtol=2e-2, err_msg=key)
        assert key == "trained tokens" or not np.allclose(*values, rtol=1e-5), f"{key}: bf16 did not take part"


PREDICTING = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --mtp-num-layers 1
    --position-embedding-type rope --make-vocab-size-divisible-by 32 --max-position-embeddings 32
    --hidden-dropout 0 --attention-dropout 0"""


@pytest.fixture(scope="module")
def one_by_one(machine, corpus, tmp_path_factory):
    """A training with multi-token prediction. All but the first token of each document is trained.

    Under context parallelism Megatron scales the prediction's loss by how many tokens a rank has before and after it
    has shifted them (`process_mtp_loss`), which for other masks is not what one rank computes. Here they are as many.
    """
    rng, lines = random.Random(7), []
    for length in (20, 12, 24, 8, 12, 12, 8, 32):
        ids = [rng.randrange(8, 56) for _ in range(length + 1)]
        mask = [0, 0] + [1] * (length - 1)
        lines.append(json.dumps({"prompt": "1?", "response": "2", "token_ids": ids, "loss_mask": mask}))
    (corpus / "predicted.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path_factory.mktemp("one")
    machine.run(command(corpus, folder, f"{ONE_BY_ONE} {PREDICTING}", "predicted.jsonl"))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_packs_with_multi_token_prediction_train_like_their_documents(machine, corpus, one_by_one, tmp_path, ranks):
    flags = f"{PACKED} --context-parallel-size {ranks} {PREDICTING}"
    machine.run(command(corpus, tmp_path, flags, "predicted.jsonl"), nproc=ranks)
    assert_same_training(one_by_one, tmp_path)


# -------------------------------------------------------------------------------------------------------------- score


def test_scores_are_those_of_local_layers(machine, corpus, model_flags, tmp_path):
    words = f"--data {corpus / 'records.jsonl'} --seq-length {SEQ_LENGTH} --chat-template chatml --per-token"
    words += f" --tokenizer-model {corpus / 'tokenizer.model'} {model_flags('qwen3')}"
    found = {}
    for name, run in (("local", forked), ("engine", machine.run)):
        output = run(["-m", "megatron_idft", "score", *words.split(), "--output", tmp_path / name])
        found[name] = pq.read_table(tmp_path / name / "scores.parquet").to_pylist()
    assert {"generic_gemm", "rmsnorm_fwd", "fused_rope_forward"} <= kernels(output)
    assert len(found["local"]) == sum(map(len, PACKS))
    for got, wanted in zip(found["engine"], found["local"], strict=True):
        assert got["id"] == wanted["id"] and got["tokens"] == wanted["tokens"]
        for name in ("log_prob", "entropy", "phi"):
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("flags", ["", "--hybrid-layer-pattern *-*-*-*-"])
def test_the_decode_engine_takes_the_place_of_its_attention(machine, tmp_path, flags):
    tiny_models.save("qwen2", tmp_path / "qwen2")
    pairs = test_engine.pairs(128)
    sampling = {"sampling": {"temperature": 0}, "stopping": {"stop_ids": [test_engine.STOP], "max_tokens": 12}}
    cases = {
        "pairs": {"requests": pairs, "slope": test_engine.SLOPE, "max_rows": 3, **sampling},
        "score": {"decode": False, "prompts": [pair["prompt"] for pair in pairs if len(pair["prompt"]) > 1]},
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    model = [
        "--hf-model",
        tmp_path / "qwen2",
        "--hf-cache",
        tmp_path / "cache",
        "--tokenizer-model",
        tmp_path / "qwen2",
    ]
    found = []
    for run in (forked, machine.run):
        run([test_engine.PROBE, tmp_path / "cases.json", tmp_path / "out.json", *model, *flags.split()])
        found.append(json.loads((tmp_path / "out.json").read_text())[1])
    local, engine = found
    for got, wanted in zip(engine["pairs"] + engine["score"], local["pairs"] + local["score"], strict=True):
        assert got.get("tokens") == wanted.get("tokens")
        for name in ("log_prob", "entropy"):
            np.testing.assert_allclose(got[name], wanted[name], atol=5e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_on_a_node_with_it(machine):
    found = {finding["name"]: finding for finding in told(machine.run([HERE / "doctor_probe.py"]))}
    assert found["transformer-engine"]["detail"].startswith("2.") and found["transformer-engine"]["ok"]
    assert found["uses: layers"]["detail"] == "transformer_engine; the programs add --no-gradient-accumulation-fusion"
    assert found["uses: optimizer"]["detail"] == "Transformer Engine's FusedAdam"
    assert "changes: without Transformer Engine" not in found

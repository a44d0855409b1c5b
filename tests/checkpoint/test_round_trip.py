"""Hugging Face -> Megatron -> Hugging Face is the same to the bit, and needs no more memory than one tensor."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_idft.checkpoint.config import read_config, read_model
from megatron_idft.checkpoint.convert import to_hf, to_megatron
from megatron_idft.checkpoint.model_flags import megatron_settings
from megatron_idft.checkpoint.safetensors_files import SafetensorsWriter
from megatron_idft.checkpoint.tensors import pieces
from megatron_idft.checkpoint.torch_dist import TorchDistCheckpoint
from tests import tiny_models
from tests.launch import ROOT


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    return found


def assert_same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 10
    for name, tensor in first.items():
        other = second[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("model_class", ["gpt", "hybrid"])
def test_every_family_is_the_same_to_the_bit(converted, tmp_path, model_class):
    for name, model in converted.items():
        if model_class in model.megatron:
            to_hf(model.megatron[model_class], tmp_path / name, progress=False)
            assert_same(model.huggingface, tmp_path / name)
            before = json.loads((model.huggingface / "config.json").read_text())
            assert json.loads((tmp_path / name / "config.json").read_text()) == before


def test_in_bf16_and_in_many_files(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_models.build("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", progress=False)
    to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000, progress=False)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same(tmp_path / "hf", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", torch_dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    to_hf(tmp_path / "megatron", tmp_path / "wide", dtype=torch.float32, progress=False)
    assert tiny_models.dtype_of(tmp_path / "wide") == "float32"
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}


def test_a_vocabulary_larger_than_a_block_is_written_in_blocks(converted, tmp_path, monkeypatch):
    source = converted["qwen3"].huggingface
    monkeypatch.setattr("megatron_idft.checkpoint.tensors.BLOCK", 64 * 10)
    to_megatron(source, tmp_path / "megatron", progress=False)
    to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=30_000, progress=False)
    assert_same(source, tmp_path / "back")
    checkpoint = TorchDistCheckpoint(tmp_path / "megatron" / "release")
    rows = checkpoint.read("output_layer.weight", (0, 0), (384, 64))
    assert torch.equal(rows[:257], tensors(source)["lm_head.weight"]) and not rows[257:].any()
    chunks = checkpoint._metadata.state_dict_metadata["output_layer.weight"].chunks
    assert [chunk.sizes[0] for chunk in chunks] == [10] * 25 + [7, 127]


def test_the_tokenizer_travels_along_and_code_does_not(converted, tmp_path):
    """Out of a snapshot in the Hugging Face hub's cache, whose files are links to the blobs beside it."""
    source = tmp_path / "hub" / "models--me--mine" / "snapshots" / "0123abcd"
    blobs = source.parents[1] / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(converted["qwen2"].huggingface.iterdir()):
        shutil.copyfile(path, blobs / f"blob{number}")
        (source / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    for name in [*files, "chat_template.jinja", "modeling_custom.py"]:
        (source / name).write_text(f"content of {name}")
    to_megatron(source, tmp_path / "megatron", progress=False)
    to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    for name in [*files, "chat_template.jinja"]:
        for folder in (tmp_path / "megatron" / "tokenizer", tmp_path / "back"):
            assert (folder / name).read_text() == f"content of {name}"
    assert not list(tmp_path.glob("megatron/**/*.py")) and not list((tmp_path / "back").glob("*.py"))


def test_a_sourced_flags_file_gives_the_flags(converted):
    for model in converted.values():
        for model_class, folder in model.megatron.items():
            script = f'set -u; source {folder}/model_flags.sh; printf "%s\\n" "${{MODEL_FLAGS[@]}}" "$VOCAB_SIZE"'
            words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
            assert words == [*model.flags(model_class), str(model.vocab)]


def test_megatrons_parser_makes_of_the_flags_what_the_checkpoint_records(converted):
    from megatron.training.arguments import add_megatron_arguments

    for model in converted.values():
        shape = read_model(read_config(model.huggingface))
        for model_class in model.megatron:
            parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
            parsed = parser.parse_args(model.flags(model_class))
            for setting in megatron_settings(shape, model_class):
                assert getattr(parsed, setting.name) == setting.value, setting
                assert [setting.flag] == list(setting.words[:1]) or setting.value == parser.get_default(setting.name)


def test_a_duplicate_of_a_tied_matrix_is_taken_if_it_is_one(tmp_path):
    from safetensors.torch import save_file

    from megatron_idft.errors import ConversionError

    tiny_models.save("llama-tied", tmp_path / "hf")
    stored = tensors(tmp_path / "hf")
    head = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as checkpoints of 2023 have
    save_file(stored | {"lm_head.weight": head}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    to_megatron(tmp_path / "hf", tmp_path / "megatron", progress=False)
    head[-1, -1] += 1
    save_file(stored | {"lm_head.weight": head}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"both are stored and differ"):
        to_megatron(tmp_path / "hf", tmp_path / "other", progress=False)


PEAK = """
import sys
from pathlib import Path
from megatron.core.dist_checkpointing.serialization import load_common_state_dict  # what to_hf imports
from megatron_idft.checkpoint import convert

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) >> 10

Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
before = status("VmRSS")
getattr(convert, sys.argv[1])(*sys.argv[2:], progress=False)
print("peak", status("VmHWM") - before)
"""


def peak_megabytes(convert: str, *args: str | Path) -> int:
    """In a process of its own: memory that another conversion freed, and that stayed resident, would serve this one."""
    command = [sys.executable, "-c", PEAK, convert, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split("peak ")[1])


def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    """Random bf16 in 28 layers, as HybridModel, whose tensors have as many names as there are layers."""
    folder = tmp_path / "hf"
    folder.mkdir()
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 28, "vocab_size": 30000}
    settings = tiny_models._BASE | size | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    plan = []
    for piece in pieces(read_model(read_config(folder)), "gpt"):
        plan += [(part.name, part.shape, torch.bfloat16) for part in piece.parts if part.start == 0]
    with SafetensorsWriter(folder, plan) as writer:
        for name, shape, _ in plan:
            writer.write(name, torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16))
    megabytes = (folder / "model.safetensors").stat().st_size >> 20
    embedding = 2 * size["vocab_size"] * size["hidden_size"] >> 20  # the largest tensor
    assert megabytes > 250 and embedding > 25

    there = peak_megabytes("to_megatron", folder, tmp_path / "megatron", "hybrid")
    back = peak_megabytes("to_hf", tmp_path / "megatron", tmp_path / "back")
    print(f"peak: {there} MB to Megatron, {back} MB to Hugging Face, for a model of {megabytes} MB")
    # A tensor is there as mapped file, as tensor and as the bytes that are written.
    assert embedding < there < 0.7 * megabytes and embedding < back < 0.7 * megabytes
    assert_same(folder, tmp_path / "back")

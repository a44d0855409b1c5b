"""What cannot be converted is refused before anything is written, naming all that is wrong and the remedy."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_idft.checkpoint.config import read_config, read_model
from megatron_idft.checkpoint.convert import to_hf, to_megatron
from megatron_idft.cli.convert import main
from megatron_idft.errors import ConversionError, UnknownFamilyError


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A private copy of a model's folder."""
    shutil.copytree(converted["qwen2"].huggingface, tmp_path / "hf")
    return tmp_path / "hf"


def change_tensors(folder: Path, change) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path) -> str:
    target = folder.parent / "megatron"
    with pytest.raises(ConversionError) as caught:
        to_megatron(folder, target, progress=False)
    assert not target.exists() and not list(folder.parent.glob(".building*"))
    return str(caught.value)


def test_missing_misshapen_and_unexpected_tensors_are_all_named(folder):
    def change(stored: dict[str, torch.Tensor]) -> None:
        del stored["model.layers.0.mlp.up_proj.weight"], stored["model.layers.3.self_attn.k_proj.bias"]
        stored["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 60)
        stored["model.norm.weight"] = torch.zeros(65)
        stored["model.layers.2.self_attn.q_norm.weight"] = torch.zeros(16)
        stored["model.layers.9.mlp.up_proj.weight"] = torch.zeros(96, 64)

    change_tensors(folder, change)
    title, *lines = refused(folder).splitlines()
    assert title == f"{folder} does not hold the tensors that its config.json implies."
    assert lines == [
        "missing (2):",
        "  - model.layers.0.mlp.up_proj.weight [96, 64]",
        "  - model.layers.3.self_attn.k_proj.bias [32]",
        "misshapen (2):",
        "  - model.layers.1.self_attn.q_proj.weight is [64, 60], should be [64, 64]",
        "  - model.norm.weight is [65], should be [64]",
        "unexpected (2):",
        "  - model.layers.2.self_attn.q_norm.weight [16]",
        "  - model.layers.9.mlp.up_proj.weight [96, 64]",
    ]


def test_a_heading_stands_over_its_own_kind_alone(folder):
    change_tensors(folder, lambda stored: stored.update({f"extra.{n:03d}": torch.zeros(1) for n in range(300)}))
    _, heading, *lines = refused(folder).splitlines()
    assert heading == "unexpected (300):" and lines[0] == "  - extra.000 [1]"
    assert lines[-1] == "  … and 240 more" and len(lines) == 61


def test_other_dtypes_are_named(folder):
    def change(stored: dict[str, torch.Tensor]) -> None:
        stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.float8_e4m3fn)
        name = "model.layers.1.self_attn.o_proj.weight"
        stored[name] = stored[name].to(torch.bfloat16)

    change_tensors(folder, change)
    message = refused(folder)
    assert "model.norm.weight: F8_E4M3" in message and "save the model unquantised" in message
    assert "decoder.layers.self_attention.linear_proj.weight have different dtypes (BF16, F32)" in message


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/was-run'\ntR.")
    message = refused(folder)
    assert "pytorch_model.bin" in message and "save_pretrained" in message
    (folder / "pytorch_model.bin").unlink()
    assert "holds neither model.safetensors nor" in refused(folder)


@pytest.mark.parametrize("damage", ["cut", "header", "index", "shard", "outside"])
def test_damaged_files_are_named(converted, tmp_path, damage):
    source = converted["mistral" if damage in ("index", "shard", "outside") else "qwen2"].huggingface
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    path = sorted(folder.glob("*.safetensors"))[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "header":
        path.write_bytes(b"\xff" * 100)
    elif damage == "index":
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.norm.weight", "model.norm.wait"))
    elif damage == "outside":
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(path.name, "../" + path.name))
    else:
        path.unlink()
    assert {"index": "model.norm.wait", "outside": "../" + path.name}.get(damage, path.name) in refused(folder)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **changes,
    }


_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {**_SCALING, "rope_type": "llama3", "low_freq_factor": 2.0}}, "low_freq_factor is 2.0"),
        ({"rope_scaling": {**_SCALING, "rope_type": "llama3", "mscale": 1}}, "mscale"),
        ({"rope_scaling": {"factor": 2.0}}, "factor without a rope_type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 10000.5}, "whole numbers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map"),
        ({"new_feature": 1}, "new_feature (1) is not known"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096"),
        ({"model_type": "mistral"}, "sliding_window is 4096"),  # transformers' default
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is true"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "qwen3_moe"}, "num_experts is missing"),
    ],
)
def test_config_fields_are_refused_by_name(changes, named):
    with pytest.raises(ConversionError) as caught:
        read_model(config(**changes))
    assert named in str(caught.value)


_LLAMA3 = {**_SCALING, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0", "500000.0"),
        ({"rope_theta": 1e4, "rope_scaling": {**_LLAMA3, "rope_theta": 5e5}}, "rope_theta is", "rope_scaling.rope_t"),
        (
            {"rope_scaling": _LLAMA3, "rope_parameters": {**_LLAMA3, "factor": 4.0}},
            "rope_scaling.factor is 8.0",
            "rope_parameters.factor is 4.0",
        ),
        ({"rope_scaling": {**_LLAMA3, "type": "linear"}}, "rope_scaling.rope_type is 'llama3'", "type is 'linear'"),
        ({"dtype": "float32", "torch_dtype": "torch.bfloat16"}, "dtype is 'float32'", "torch_dtype is 'torch.bf"),
        ({"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 4}, "num_experts is 8", "experts is 4"),
        ({"layer_types": ["full_attention"] * 3}, "num_hidden_layers is 2", "layer_types names 3 layers"),
    ],
)
def test_what_is_given_twice_must_agree(changes, first, second):
    with pytest.raises(ConversionError) as caught:
        read_model(config(**changes), "model/config.json")
    [line] = [line for line in str(caught.value).splitlines() if first in line]
    assert second in line and "model/config.json" in str(caught.value)


def test_what_is_given_twice_and_agrees_is_read():
    twice = {"rope_theta": 500000, "rope_scaling": _LLAMA3 | {"type": "llama3"}, "dtype": "bfloat16"}
    twice |= {"rope_parameters": {**_LLAMA3, "rope_theta": 500000.0}, "torch_dtype": "torch.bfloat16", "head_dim": 32}
    once = config(rope_theta=500000, rope_scaling=_LLAMA3, head_dim=32)
    assert read_model(config(**twice)) == read_model(once)


def test_a_name_that_stands_twice_in_the_file_is_refused(tmp_path):
    text = json.dumps(config())
    (tmp_path / "config.json").write_text(text.replace("{", '{"vocab_size": 100, ', 1))
    assert read_config(tmp_path) == config()
    (tmp_path / "config.json").write_text(text.replace("{", '{"vocab_size": 200, ', 1))
    with pytest.raises(ConversionError, match=r"config\.json: vocab_size stands there twice, as 200 and as 100"):
        read_config(tmp_path)


def test_all_fields_are_named_at_once_and_both_ways_of_writing_rope_are_read():
    with pytest.raises(ConversionError) as caught:
        read_model(config(mlp_bias=True, strange=1, rope_scaling={"type": "dynamic", "factor": 2}))
    assert all(name in str(caught.value) for name in ("mlp_bias", "strange", "dynamic"))
    old = read_model(config(rope_theta=500000.0, rope_scaling={**_SCALING, "rope_type": "llama3"}))
    new = read_model(config(rope_parameters={**_SCALING, "rope_type": "llama3", "rope_theta": 500000.0}))
    assert old == new and (old.rope_theta, old.rope_scaling_factor) == (500000, 8.0)
    assert read_model(config()).rope_theta == 10000 and read_model(config(rope_scaling=None)).groups == 4


def test_an_unknown_family_gets_the_advice(folder, capsys):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "gpt_neox"}))
    with pytest.raises(UnknownFamilyError, match=r"'gpt_neox' has no conversion table.*Megatron-Bridge"):
        main(["to-megatron", str(folder), str(folder.parent / "out")])
    assert not (folder.parent / "out").exists()


def test_hybrid_model_has_no_llama3_scaling(converted, tmp_path):
    with pytest.raises(ConversionError, match=r"make it a GPTModel \(--model gpt"):
        to_megatron(converted["llama"].huggingface, tmp_path / "out", "hybrid", progress=False)


def test_nothing_is_overwritten(folder, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(ConversionError, match="exists already"):
        to_megatron(folder, target, progress=False)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_an_interrupted_conversion_leaves_nothing(folder, monkeypatch):
    from megatron_idft.checkpoint import convert

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_flags_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_megatron(folder, folder.parent / "out", progress=False)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_checkpoint_of_another_model_is_not_written_as_this_one(converted, tmp_path):
    checkpoint = converted["qwen3"].megatron["gpt"]
    with pytest.raises(ConversionError) as caught:
        to_hf(checkpoint, tmp_path / "out", converted["mistral"].huggingface, progress=False)
    message = str(caught.value)
    for line in ("kv_channels: 24 in the checkpoint, 16 in config.json", "qk_layernorm: True", "rotary_base: 10000"):
        assert line in message
    shutil.copytree(converted["qwen3"].megatron["gpt"] / "tokenizer", tmp_path / "config")
    settings = json.loads((tmp_path / "config" / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps(settings | {"vocab_size": 500}))
    with pytest.raises(ConversionError, match=r"misshapen \(2\):\n  - embedding.word_embeddings.weight is \[384, 64\]"):
        to_hf(checkpoint, tmp_path / "out", tmp_path / "config", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_named(converted, tmp_path):
    with pytest.raises(ConversionError, match="is not a Megatron checkpoint"):
        to_hf(tmp_path, tmp_path / "out")
    checkpoint = converted["qwen3"].megatron["gpt"]
    with pytest.raises(ConversionError, match="there is no checkpoint"):
        to_hf(checkpoint, tmp_path / "out", iteration=7)
    with pytest.raises(ConversionError, match="pass --hf-config"):
        to_hf(_alone(checkpoint, tmp_path), tmp_path / "out")


def _alone(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint / "release", folder / "alone" / "release")
    (folder / "alone" / "latest_checkpointed_iteration.txt").write_text("release")
    return folder / "alone"


def test_the_verb_converts_both_ways(converted, tmp_path, capsys):
    hf, there, back = (str(path) for path in (converted["qwen2"].huggingface, tmp_path / "m", tmp_path / "b"))
    assert main(["to-megatron", hf, there, "--model", "hybrid"]) == 0
    assert "true vocabulary 128" in capsys.readouterr().out
    assert main(["to-hf", there, back, "--dtype", "bf16"]) == 0
    assert load_file(Path(back) / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert main([]) == 2 and main(["--help"]) == 0

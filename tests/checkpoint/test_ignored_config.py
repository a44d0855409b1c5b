"""Unknown fields of config.json: ignored and named, refused, or ignored on the user's word."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_idft.checkpoint.cache import cached_checkpoint
from megatron_idft.checkpoint.config import read_config, read_model
from megatron_idft.checkpoint.config_fields import could_matter
from megatron_idft.cli.convert import main
from megatron_idft.errors import ArgumentError, ConversionError
from megatron_idft.integration.platform.hf_model import expand
from tests.public_configs import CONFIGS, PUBLIC


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A private copy of a model's folder, with a field that could matter and two that cannot."""
    shutil.copytree(converted["qwen2"].huggingface, tmp_path / "hf")
    change(tmp_path / "hf", strange=7, unsloth_version="2025.3", note="text")
    return tmp_path / "hf"


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("value", ["text", "/a/path", "", None, [], {}, False, 0, 0.0])
def test_text_and_what_is_off_cannot_matter(value):
    assert not could_matter("unknown", value)
    assert read_model(CONFIGS["qwen3-8b"] | {"unknown": value}).ignored == ("unknown",)


@pytest.mark.parametrize("value", [True, 1, -1, 0.5, ["text"], [0], {"a": None}])
def test_other_values_of_unknown_names_could(value):
    with pytest.raises(ConversionError, match=r"unknown \(.*If it does not, pass --ignore-config unknown"):
        read_model(CONFIGS["qwen3-8b"] | {"unknown": value})
    assert read_model(CONFIGS["qwen3-8b"] | {"unknown": value}, ignore=["unknown"]).ignored_by_user == ("unknown",)
    for name in (
        "_unknown",
        "unsloth_unknown",
        "lora_unknown",
        "image_token_id",
        "temperature",
        "gradient_checkpointing",
    ):
        assert read_model(CONFIGS["qwen3-8b"] | {name: value}).ignored == (name,)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama3-8b", {"is_causal": False}),
        ("llama3-8b", {"position_embedding_type": "alibi"}),
        ("llama3-8b", {"attention_type": "sliding"}),
        ("llama3-8b", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("llama3-8b", {"norm_type": "layernorm"}),
        ("llama3-8b", {"rope_type": "yarn"}),
        ("llama3-8b", {"use_rope": False}),
        ("llama3-8b", {"logit_scale": 0.0}),
        ("llama3-8b", {"transformers_weights": "other.safetensors"}),
        ("llama3-8b", {"per_layer_config": {"0": {"sliding_window": 8}}}),
        ("llama3-8b", {"qkv_bias": True}),
        ("qwen2.5-7b", {"qkv_bias": False}),
        ("qwen3-8b", {"use_qk_norm": False}),
        ("qwen3-30b-a3b", {"scoring_func": "sigmoid"}),
        ("qwen3-30b-a3b", {"routed_scaling_factor": 2.5}),
    ],
)
def test_text_and_switches_that_choose_a_computation_are_known_by_name(model, fields):
    """By their name they would be text or off; nor may a user say that they do not matter."""
    (name,) = fields
    for ignore in ((), (name,)):
        with pytest.raises(ConversionError, match=f"{name} is .* is served"):
            read_model(CONFIGS[model] | fields, ignore=ignore)


def test_fields_that_the_model_depends_on_cannot_be_ignored():
    names = ["hidden_size", "hidden_act", "rope_scaling", "nosuch", "x" * 1000, "use_cach", "a b\n"]
    with pytest.raises(ConversionError) as caught:
        read_model(CONFIGS["llama3.1-8b"], ignore=names)
    lines = str(caught.value).splitlines()[1:]
    assert [" depends on this field" in line for line in lines] == [False, True, True, False, True, False, False]
    assert lines[0].startswith(r"  - --ignore-config $'a b\n': there is no such field")
    assert lines[5].endswith("--ignore-config use_cach: there is no such field. Drop it, or correct its name")
    assert all("--ignore-config" in line and len(line) < 200 for line in lines)


def test_an_ignored_window_leaves_the_positions_up_to_it(converted, tmp_path):
    for name in ("Mistral 7B v0.1", "Ministral 8B"):
        config = PUBLIC[name].config
        model = read_model(config, ignore=["sliding_window"])
        assert model.max_positions == config["sliding_window"]
        assert f"; the model has {model.max_positions} positions then" in model.ignored_lines("c")[0]
    switched = CONFIGS["qwen2.5-7b"] | {"use_sliding_window": True, "sliding_window": 64}
    switched |= {"layer_types": ["full_attention"] * 14 + ["sliding_attention"] * 14}
    assert read_model(switched, ignore=["use_sliding_window"]).max_positions == 64
    folder = shutil.copytree(converted["mistral"].huggingface, tmp_path / "hf")
    change(folder, sliding_window=32)
    words = ["--hf-model", str(folder), "--ignore-config", "sliding_window", "--max-position-embeddings"]
    assert expand([*words, "32"])
    with pytest.raises(ArgumentError, match=r"embeddings 128 \(the model is --max-position-embeddings 32\)"):
        expand([*words, "128"])
    with pytest.raises(ArgumentError, match="more than the 32 positions"):
        main(["check", *words[:4], "--seq-length", "33"])
    for bad in (0, 1.5, "4096", True):
        with pytest.raises(ConversionError, match=r"sliding_window is .*, should be a whole number"):
            read_model(PUBLIC["Mistral 7B v0.1"].config | {"sliding_window": bad}, ignore=["sliding_window"])


def test_a_conversion_names_what_it_ignores_and_the_way_back_keeps_it(folder, tmp_path, capsys):
    there, back = str(tmp_path / "megatron"), tmp_path / "back"
    with pytest.raises(ConversionError, match=r"strange \(7\) is not known.*--ignore-config strange"):
        main(["to-megatron", str(folder), there])
    with pytest.raises(ConversionError, match=r"strang: there is no such field; did you mean strange\?"):
        main(["to-megatron", str(folder), there, "--ignore-config", "strang"])
    assert main(["to-megatron", str(folder), there, "--ignore-config", "strange"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "ignored" in line]
    assert len(lines) == 2
    assert lines[0].endswith("model computes: note, unsloth_version")
    assert lines[1] == f"{folder}/config.json: ignored by --ignore-config: strange"
    record = json.loads((tmp_path / "megatron" / "conversion.json").read_text())
    assert (record["ignored"], record["ignored_by_user"]) == (["note", "unsloth_version"], ["strange"])
    assert main(["to-hf", there, str(back)]) == 0
    assert capsys.readouterr().out.count("ignored by --ignore-config: strange") == 1
    assert read_config(back) == read_config(folder)


def test_to_hf_takes_the_flag_for_a_config_of_its_own(converted, folder, tmp_path):
    checkpoint = str(converted["qwen2"].megatron["gpt"])  # made without the flag
    words = ["to-hf", checkpoint, str(tmp_path / "back"), "--hf-config", str(folder)]
    with pytest.raises(ConversionError, match="--ignore-config strange"):
        main(words)
    assert main([*words, "--ignore-config", "strange"]) == 0
    assert read_config(tmp_path / "back")["strange"] == 7


def test_the_check_of_the_launcher_says_it_too(folder, capsys):
    flags = ["--hf-model", str(folder), "--seq-length", "8"]
    with pytest.raises(ConversionError, match="--ignore-config strange"):
        main(["check", *flags])
    assert main(["check", *flags, "--ignore-config", "strange", "--bf16"]) == 0
    out = capsys.readouterr().out
    assert "ignored by --ignore-config: strange" in out and "model computes: note, unsloth_version" in out
    with pytest.raises(ArgumentError, match="expected at least one argument"):
        main(["check", *flags, "--ignore-config"])
    with pytest.raises(ArgumentError, match="name the folder"):
        main(["check", "--ignore-config", "strange", str(folder)])


def test_the_flags_of_a_model_say_it_once_on_rank_0(folder, tmp_path, capsys, monkeypatch):
    words = ["--hf-model", str(folder), "--hf-cache", str(tmp_path / "cache"), "--hf-model-class", "gpt"]
    with pytest.raises(ConversionError, match="--ignore-config strange"):
        expand(words)
    expanded = expand([*words, "--ignore-config", "strange", "--lr", "1"])
    told = capsys.readouterr().out.splitlines()
    with pytest.raises(ArgumentError, match="pass --hf-model, or drop it"):
        expand(["--load", "checkpoint", "--ignore-config", "strange"])
    assert [line.rpartition(": ")[2] for line in told] == ["note, unsloth_version", "strange"]
    assert all(line.startswith(f"> {folder}/config.json: ") for line in told)
    monkeypatch.setenv("RANK", "1")
    assert expand([*words, "--ignore-config=strange", "--lr", "1"])[-1] == expanded[-1]
    assert not capsys.readouterr().out


def test_the_cache_is_of_what_was_ignored(folder, tmp_path):
    def cache(*ignore: str) -> str:
        model = read_model(read_config(folder), ignore=ignore)
        return cached_checkpoint(folder, tmp_path / "cache", "gpt", model.ignored_by_user).name

    assert cache("strange") == cache("strange", "note") != cached_checkpoint(folder, tmp_path / "cache", "gpt").name
    change(folder, other=1)
    assert cache("strange", "other") == cache("other", "strange")


def test_random_fields_of_random_types_end_in_a_model_or_a_refusal():
    rng = random.Random(3)
    leaves = [None, True, False, 0, 1, -7, 0.0, 0.5, 1e300, "", "text", "\ud800", "x" * 500, 10**40]

    def value(depth: int = 0) -> Any:
        kind = rng.random()
        if depth > 3 or kind < 0.6:
            return rng.choice(leaves)
        items = [value(depth + 1) for _ in range(rng.randrange(4))]
        return items if kind < 0.8 else {str(rng.choice(leaves)): item for item in items}

    stems = ["", "_", "unsloth_", "use_", "attn_", "\n", "--", "a b", "x" * 200, "é"]
    known = [name for config in CONFIGS.values() for name in config]
    for _ in range(3000):
        base = rng.choice(list(CONFIGS.values()))
        names = [rng.choice(stems) + str(rng.randrange(9)) if rng.random() < 0.7 else rng.choice(known) for _ in "abc"]
        fields = {name: value() for name in names}
        ignore = [name for name in fields if rng.random() < 0.3]
        try:
            model = read_model(base | fields, ignore=ignore)
        except ConversionError as error:
            assert len(str(error)) < 5000
            continue
        assert all(len(line) < 2000 for line in model.ignored_lines("config.json"))
        unknown = {name for name in fields if name not in known and could_matter(name, fields[name])}
        assert unknown <= set(model.ignored_by_user) <= set(ignore)
        assert {name for name in fields if name not in known} <= {*model.ignored, *model.ignored_by_user}

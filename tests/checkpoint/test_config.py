"""config.json: the public forms of the families that are converted, and several thousand damaged ones."""

import json
import math
from typing import Any

import pytest

from megatron_idft.checkpoint.config import read_config, read_model
from megatron_idft.checkpoint.model_flags import megatron_settings
from megatron_idft.errors import ConversionError
from tests.public_configs import CONFIGS, PUBLIC

_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA2 = {"vocab_size": 32000, "rope_theta": 10000.0, "num_key_value_heads": 32, "max_position_embeddings": 4096}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000}
_BASE: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama3-8b"],
    "llama3.1": CONFIGS["llama3.1-8b"],
    "mistral": {
        name: value
        for name, value in (CONFIGS["llama3-8b"] | _MISTRAL).items()
        if name not in ("attention_bias", "pretraining_tp", "rope_scaling", "attention_dropout")
    },
    "qwen2": CONFIGS["qwen2.5-7b"],
    "qwen3": CONFIGS["qwen3-8b"],
    "qwen3_moe": CONFIGS["qwen3-30b-a3b"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_folders_convert_or_are_refused_by_name(name):
    public = PUBLIC[name]
    if public.refused:
        with pytest.raises(ConversionError) as caught:
            read_model(public.config)
        assert all(part in str(caught.value) for part in public.refused)
        assert len(str(caught.value).splitlines()) == 2  # the title and the one field
    if not public.refused or public.ignore:
        shape = read_model(public.config, ignore=public.ignore)
        assert (shape.ignored_by_user, megatron_settings(shape, "gpt") != []) == (public.ignore, True)
        if not public.refused:
            assert shape.ignored == public.ignored


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if not public.refused])
def test_public_folders_are_read_as_transformers_reads_them(name):
    from transformers import AutoConfig

    config = PUBLIC[name].config
    fields = {field: value for field, value in config.items() if field != "model_type"}
    theirs, ours = AutoConfig.for_model(config["model_type"], **fields), read_model(config)
    rope = getattr(theirs, "rope_parameters", None)
    if rope is None:  # transformers 4
        rope = {"rope_theta": theirs.rope_theta, **(getattr(theirs, "rope_scaling", None) or {})}
    heads = theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert (ours.heads, ours.groups, ours.layers) == (heads, theirs.num_key_value_heads, theirs.num_hidden_layers)
    assert (ours.norm_eps, ours.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert (ours.rope_theta, ours.rope_scaling_factor) == (rope["rope_theta"], rope.get("factor"))
    assert getattr(theirs, "sliding_window", None) is None or not getattr(theirs, "use_sliding_window", True)
    assert ours.normalise_top_k == getattr(theirs, "norm_topk_prob", False)


# Fields with which Megatron's model would compute something else.
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mrope": ("qwen2", {"use_mrope": True}, "use_mrope is true"),
    "window": ("mistral", {"sliding_window": 4096}, "sliding_window is 4096"),  # Mistral v0.1
    "window of transformers": ("mistral", {}, "sliding_window is 4096"),
    "Qwen's window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true"),
    "yarn": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    "interleaved": ("llama", {"rope_interleaved": True}, "rope_interleaved is true"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "code": ("llama", {"auto_map": {"AutoModel": "m.M"}}, "auto_map is {'AutoModel': 'm.M'}"),
    "qkv bias": ("qwen3_moe", {"qkv_bias": True}, "qkv_bias is true"),
    "no norm": ("qwen3", {"use_qk_norm": False}, "use_qk_norm is false"),
    "shared expert": ("qwen3_moe", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size is 512"),
    "million tokens": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
    "a number for a switch": ("llama", {"mlp_bias": 0}, "mlp_bias is 0"),
    "heads": ("llama", {"num_attention_heads": 24}, "no multiple of num_attention_heads 24"),
    "groups": ("llama", {"num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"),
    "odd heads": ("llama", {"head_dim": 65}, "need an even one"),
    "experts": ("qwen3_moe", {"num_experts_per_tok": 200}, "num_experts_per_tok is 200, with 128 experts"),
    "many experts": ("qwen3_moe", {"num_experts": 16384}, "times 16384 experts"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_by_field_and_value(name):
    family, fields, told = OTHERS[name]
    with pytest.raises(ConversionError) as caught:
        read_model(_BASE[family] | fields)
    assert told in str(caught.value)


_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1e30, -1e30, 5e-324, math.nan, math.inf, 10**30, 10**400, 1 << 63,
    "", "7", "x" * 100_000, "\ud800", [], [1], [None], ["full_attention", 7], _DEEP, list(range(10_000)), {}, {"a": 1},
    {"type": "llama3"}, {"rope_type": []}, {"rope_type": "llama3", "factor": "8"}, {"rope_theta": {}},
    {"factor": math.nan}, {"rope_type": "llama3", **_LLAMA3, "factor": 10**400}, {"x" * 100_000: 1},
    {str(n): n for n in range(10_000)},
]  # fmt: skip


@pytest.mark.parametrize("family", _BASE)
def test_any_value_in_any_field_is_read_or_refused_in_a_few_lines(family):
    """Every field of the family with every value, one at a time: a shape that is safe to build, or a refusal."""
    base = _BASE[family] | ({"sliding_window": None} if family == "mistral" else {})
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA3}
    changed = [base | {name: value} for name in {*base, "head_dim", "layer_types", "dtype", "new"} for value in VALUES]
    changed += [base | {"rope_scaling": rope | {name: value}} for name in rope for value in VALUES]
    changed += [{name: value for name, value in base.items() if name != left} for left in base]
    refused = 0
    for config in changed:
        try:
            model = read_model(config)
        except ConversionError as error:
            refused += 1
            assert len(str(error)) < 20_000
            continue
        counts = (model.vocab, model.hidden, model.ffn, model.layers, model.heads, model.groups, model.head_dim)
        assert all(type(count) is int and count > 0 for count in counts)
        assert model.layers * max(1, model.experts) <= 1 << 17 and model.heads % model.groups == 0
        assert type(model.rope_theta) is int and 0 <= model.norm_eps <= 1 and type(model.tied) is bool
        assert megatron_settings(model, "gpt")
    assert refused > len(changed) / 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"7", b"{", b'{"vocab_size": NaN}', b'{"vocab_size": -Infinity}', b"\xff\xfe", b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "' + b"x" * (5 << 20) + b'"}', b"version https://git-lfs.github.com/spec/v1\n",
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1000
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConversionError, match="it has no config"):
        read_config(tmp_path)


def test_what_transformers_saves_is_read():
    """Each field that transformers writes for a model of its own defaults is known, by name or by its neutral value."""
    from transformers import AutoConfig

    for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral"):
        config = AutoConfig.for_model(family)
        if family == "mistral":
            config.sliding_window = None
        assert read_model(json.loads(config.to_json_string(use_diff=False))).family.model_type == family

"""Damaged tokenizer folders: each is refused in one line that names the file, and nothing of it runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_idft.checkpoint.folders import copy_companions
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import InputError
from tests.data.chat_templates import CHATML

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7031645\n"


@pytest.fixture
def folder(huggingface_folder, tmp_path) -> Path:
    shutil.copytree(huggingface_folder("byte-level", CHATML), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def refused(path: Path, words: str, **options) -> str:
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(path, **options)
    assert len(str(caught.value)) < 1200 and str(path) in str(caught.value)
    return str(caught.value)


# Name of the file, what becomes of its text (None: it is removed), words of the refusal.
DAMAGES = {
    "removed": ("tokenizer.json", lambda text: None, "tokenizer.json is missing"),
    "truncated": ("tokenizer.json", lambda text: text[: len(text) // 2], "tokenizer.json is not JSON"),
    "empty": ("tokenizer.json", lambda text: "", "tokenizer.json is empty"),
    "pointer": ("tokenizer.json", lambda text: POINTER, r"tokenizer.json is a pointer of git-lfs.*git lfs pull"),
    "garbage": ("tokenizer.json", lambda text: b"\xff\xfe\x00\x01" * 9, "tokenizer.json is not UTF-8 text"),
    "a list": ("tokenizer.json", lambda text: "[1, 2]", "tokenizer.json holds a list"),
    "nested": ("tokenizer.json", lambda text: '{"a":' * 90_000, "tokenizer.json is not JSON"),
    "other JSON": ("tokenizer.json", lambda text: "{}", "tokenizer.json has no `model`"),
    "model of no kind": (
        "tokenizer.json",
        lambda text: json.dumps(json.loads(text) | {"model": {"type": "X"}}),
        "tokenizer.json holds no tokenizer",
    ),
    "vocabulary lost": (
        "tokenizer.json",
        lambda text: json.dumps(json.loads(text) | {"model": {"type": "BPE", "vocab": {}, "merges": []}}),
        "no tokenizer of text",
    ),
    "config truncated": ("tokenizer_config.json", lambda text: text[:-9], "tokenizer_config.json is not JSON"),
    "config a pointer": ("tokenizer_config.json", lambda text: POINTER, "tokenizer_config.json is a pointer"),
    "config garbage": ("tokenizer_config.json", lambda text: b"\xff\xfe", "tokenizer_config.json is not UTF-8"),
    "config a number": ("tokenizer_config.json", lambda text: "7", "tokenizer_config.json holds a int"),
    "template not UTF-8": ("chat_template.jinja", lambda text: b"\xe9 {{ x }}", "chat_template.jinja is not UTF-8"),
    "template a pointer": ("chat_template.jinja", lambda text: POINTER, "chat_template.jinja is a pointer"),
    "token map truncated": ("special_tokens_map.json", lambda text: '{"bos"', "special_tokens_map.json is not JSON"),
    "model config truncated": ("config.json", lambda text: '{"vocab_size": 1', "config.json is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(folder, name):
    file, damage, words = DAMAGES[name]
    path = folder / file
    damaged = damage(path.read_text() if path.exists() else "")
    if damaged is None:
        path.unlink()
    elif isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        path.write_text(damaged)
    refused(folder, words)


@pytest.mark.parametrize("template", [7, [1, 2], [{"name": "default", "template": 7}], [{"name": "default"}]])
def test_a_chat_template_that_is_no_text_is_refused(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=template)
    refused(folder, "tokenizer_config.json, chat_template: expected a text")


def test_a_token_that_is_no_text_is_refused(folder):
    edit(folder / "tokenizer_config.json", eos_token=3)
    refused(folder, "tokenizer_config.json, eos_token: expected a text, found '3'")


@pytest.mark.parametrize("tokenizer_class", ["Qwen2TokenizerFast", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_an_interrupted_download_is_no_empty_tokenizer(folder, tokenizer_class):
    """transformers 5 makes one of the class alone; what else of the folder had come changes nothing."""
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json is missing; there is only .*tokenizer_config.json")
    (folder / "vocab.json").write_text("{}")  # without merges.txt
    refused(folder, "tokenizer.json is missing")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    refused(folder, "no tokenizer of text|transformers makes no tokenizer")
    for path in folder.iterdir():
        path.unlink()
    refused(folder, "tokenizer.json is missing; there is no file of a tokenizer")


def test_a_vocabulary_without_its_merges_is_refused(tmp_path):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [f"word{i}" for i in range(6000)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, *words])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="word1")
    hf.chat_template = CHATML
    hf.save_pretrained(tmp_path)
    refused(tmp_path, "letter by letter: its merges are missing")


def test_a_tokenizer_that_is_not_the_models_is_refused(folder):
    size = load_tokenizer(folder).vocab_size
    (folder / "config.json").write_text(json.dumps({"vocab_size": 2 * size}))  # as padded models have it
    load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 151936}))
    refused(folder, f"the tokenizer has {size} ids, config.json says vocab_size 151936")


@pytest.mark.parametrize("damage", [b"", POINTER.encode(), b"\x00garbage" * 50, b"half"])
def test_a_damaged_sentencepiece_model_is_refused(sentencepiece_model, tmp_path, damage):
    path = tmp_path / "tokenizer.model"
    content = sentencepiece_model.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == b"half" else damage)
    refused(path, "is empty|pointer of git-lfs|is no sentencepiece model", chat_template="chatml")


def test_no_code_of_a_folder_runs(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]}, tokenizer_class="T")
    refused(folder, "transformers makes no tokenizer of these files")
    assert not ran.exists()


# Links


@pytest.fixture
def outside(huggingface_folder, tmp_path) -> Path:
    return Path(shutil.copytree(huggingface_folder("metaspace", CHATML), tmp_path / "secret"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_link_out_of_the_folder_is_refused_and_not_copied(folder, outside, tmp_path, file):
    target = outside / file
    if not target.exists():
        target.write_text("{}")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(target)
    refused(folder, "is a symbolic link out of its folder, to ")
    with pytest.raises(InputError, match="is a symbolic link out of its folder"):
        copy_companions(folder, tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_a_folder_of_templates_that_is_a_link_out_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tools.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a symbolic link out of its folder")
    with pytest.raises(InputError, match="is a symbolic link out of its folder"):
        copy_companions(folder, tmp_path / "copied")


def test_a_path_out_of_the_folder_is_refused(folder, outside):
    """transformers 4 opens the file that tokenizer_config.json names."""
    edit(folder / "tokenizer_config.json", tokenizer_file=str(outside / "tokenizer.json"))
    refused(folder, "tokenizer_config.json, tokenizer_file: .* leads out of the folder")


def test_the_hub_cache_is_read_and_copied(folder, tmp_path):
    """snapshots/REVISION holds links into ../../blobs, which are the model's own."""
    entry = tmp_path / "hub" / "models--me--mine"
    snapshot, blobs = entry / "snapshots" / "0123abcd", entry / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / f"{len(path.name):064x}-{path.suffix[1:]}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{len(path.name):064x}-{path.suffix[1:]}", snapshot))
    link = tmp_path / "mine"
    link.symlink_to(snapshot)  # a name that the user gave it
    for place in (snapshot, link):
        load_tokenizer(place)
        copy_companions(place, tmp_path / f"copied-{place.name}")
        assert not (tmp_path / f"copied-{place.name}" / "tokenizer.json").is_symlink()
    load_tokenizer(tmp_path / "copied-mine")
    blob = (snapshot / "tokenizer.json").resolve()
    blob.unlink()
    refused(snapshot, "which is not there: was the download interrupted")
    blob.symlink_to("/etc/passwd")
    refused(snapshot, "is a symbolic link out of its folder, to /etc/passwd")

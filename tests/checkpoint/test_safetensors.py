"""Safetensors that are broken or that point elsewhere are refused, and no file outside of the folder is opened."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_idft.checkpoint.cache import cached_checkpoint
from megatron_idft.checkpoint.convert import to_megatron
from megatron_idft.checkpoint.safetensors_header import read_folder, read_header
from megatron_idft.errors import ConversionError, InputError

A, B = "model.a", "model.b"
INDEX = "model.safetensors.index.json"


def written(folder: Path, header: Any, content: bytes = b"\0" * 48, length: int | None = None) -> Path:
    """A file with this header, an object or bytes, which says that it has `length` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + content)
    return path


def header(**changes: dict[str, Any]) -> dict[str, Any]:
    """[2, 4] and [4] of fp32: 48 bytes."""
    first = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    second = {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]}
    return {A: first | changes.get("a", {}), B: second | changes.get("b", {})}


TWICE = json.dumps(header()).replace(B, A).encode()
DEEP = b'{"a":' + b"[" * 100_000
BROKEN: dict[str, tuple[Any, str]] = {
    "overlap": (header(b={"data_offsets": [16, 32]}), "model.a begins at byte|model.b begins at byte"),
    "gap": (header(a={"shape": [4], "data_offsets": [0, 16]}), "model.b begins at byte"),
    "gap at the start": (header(a={"shape": [4], "data_offsets": [16, 32]}), "model.a begins at byte"),
    "rest": (header(b={"shape": [2], "data_offsets": [32, 40]}), "its tensors end at byte"),
    "behind the end": (header(b={"shape": [400], "data_offsets": [32, 1632]}), "its tensors end at byte"),
    "negative": (header(a={"data_offsets": [-32, 0]}), "no lists of whole numbers"),
    "backwards": (header(a={"data_offsets": [32, 0]}), "no range"),
    "three offsets": (header(a={"data_offsets": [0, 16, 32]}), "no range"),
    "fractions": (header(a={"data_offsets": [0.0, 32.5]}), "no lists of whole numbers"),
    "words": (header(a={"data_offsets": ["0", "32"]}), "no lists of whole numbers"),
    "switches": (header(a={"shape": [True, 8]}), "no lists of whole numbers"),
    "shape": (header(a={"shape": [2, 5]}), "which is not its shape"),
    "negative shape": (header(a={"shape": [-2, -4]}), "no lists of whole numbers"),
    "huge shape": (header(a={"shape": [1 << 40, 1 << 40]}), "which is not its shape"),
    "dtype": (header(a={"dtype": "F64"}), "which is not its shape and dtype"),
    "dtype that is a number": (header(a={"dtype": 7}), "has a dtype that is no name"),
    "no dtype": ({A: {"shape": [12], "data_offsets": [0, 48]}}, "not described"),
    "entry that is a list": ({A: [0, 48]}, "not described"),
    "list": ([], "no JSON object"),
    "not JSON": (b"{" * 40, "property name"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "UTF-16": ("{}".encode("utf-16"), "utf-8"),
    "deep": (DEEP, "recursion"),
    "a name twice": (TWICE, "model.a stands twice"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "dtype stands twice"),
    "a long name": ({"x" * 100_000: 7}, "not described"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_as_safetensors_refuses_it(tmp_path, kind):
    content, told = BROKEN[kind]
    path = written(tmp_path, content)
    with pytest.raises(ConversionError, match=told) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt") as file:
        file.keys()


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 1 << 40, (1 << 64) - 1])
def test_a_header_of_impossible_length_is_refused_at_once(tmp_path, length):
    written(tmp_path, header(), length=length)
    with pytest.raises(ConversionError, match=r"header of|not a whole"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\1\2\3")
    with pytest.raises(ConversionError, match="header of"):
        read_folder(tmp_path)


def test_what_safetensors_refuses_is_refused(tmp_path):
    """Two thousand files with some bytes of a sound one changed: whatever is read here, its own reader reads too."""
    path = tmp_path / "model.safetensors"
    save_file({A: torch.ones(2, 4), B: torch.ones(4).half(), "c": torch.ones(0, 3)}, path, {"format": "pt"})
    sound = path.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    rng = random.Random(1)
    read = 0
    for _ in range(2000):
        damaged = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2))):
            damaged[rng.randrange(end)] = rng.choice(b'0123456789[]{}",: -.eE\x00\xff')
        if rng.random() < 0.1:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            found = read_header(path)
        except ConversionError:
            continue
        read += 1
        if any(tensor.dtype not in ("F32", "F16") for tensor in found.values()):
            continue  # a dtype that it does not know may be known to a newer one; the conversion serves none of them
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(found)
            for name, tensor in found.items():
                assert tuple(file.get_slice(name).get_shape()) == tensor.shape
    assert 100 < read < 1900


OUTSIDE: dict[str, Callable[[Path, Path], None]] = {}


def outside(way: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    OUTSIDE[way.__name__] = way
    return way


def place(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {A: file}}))


@outside
def dots(folder: Path, secret: Path) -> None:
    place(folder, f"../{secret.parent.name}/{secret.name}")


@outside
def absolute(folder: Path, secret: Path) -> None:
    place(folder, str(secret))


@outside
def parent(folder: Path, secret: Path) -> None:
    place(folder, "..")


@outside
def link_of_a_shard(folder: Path, secret: Path) -> None:
    (folder / "model-1.safetensors").symlink_to(secret)
    place(folder, "model-1.safetensors")


@outside
def link_of_the_weights(folder: Path, secret: Path) -> None:
    (folder / "model.safetensors").symlink_to(secret)


@outside
def link_over_a_link(folder: Path, secret: Path) -> None:
    (folder / "step").symlink_to(secret.parent)
    (folder / "model.safetensors").symlink_to(folder / "step" / secret.name)


@outside
def link_of_the_index(folder: Path, secret: Path) -> None:
    (folder / INDEX).symlink_to(secret)


@outside
def other_blobs(folder: Path, secret: Path) -> None:
    """As in a hub's cache, but to the blobs of another repository."""
    (folder / "model.safetensors").symlink_to(secret)


@outside
def link_of_the_config(folder: Path, secret: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)


@outside
def link_of_the_tokenizer(folder: Path, secret: Path) -> None:
    shutil.copyfile(folder.parent / "sound.safetensors", folder / "model.safetensors")
    (folder / "tokenizer.json").symlink_to(secret)


@outside
def link_of_a_template(folder: Path, secret: Path) -> None:
    shutil.copyfile(folder.parent / "sound.safetensors", folder / "model.safetensors")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").symlink_to(secret)


_opened: list[str] | None = None


@sys.addaudithook
def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(os.path.realpath(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else "")


@pytest.mark.parametrize("way", OUTSIDE)
def test_no_file_outside_of_the_folder_is_opened(converted, tmp_path, way):
    global _opened
    folder = tmp_path / "models--a--b" / "snapshots" / "1" if way == "other_blobs" else tmp_path / "hf"
    secret = tmp_path / "models--c--d" / "blobs" / "secret" if way == "other_blobs" else tmp_path / "else" / "secret"
    folder.mkdir(parents=True)
    secret.parent.mkdir(parents=True)
    source = converted["qwen2"].huggingface
    shutil.copyfile(source / "model.safetensors", secret)
    shutil.copyfile(source / "model.safetensors", folder.parent / "sound.safetensors")
    shutil.copyfile(source / "config.json", folder / "config.json")
    OUTSIDE[way](folder, secret)
    _opened = []
    try:
        cached_checkpoint(folder, tmp_path / "cache", "gpt")
        with pytest.raises(InputError, match=r"link out of its folder|not a file of this folder"):
            to_megatron(folder, tmp_path / "out", progress=False)
        assert (str(secret) not in _opened and str(folder / "config.json") in _opened) or way == "link_of_the_config"
    finally:
        _opened = None
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".building*"))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (b"[]", "no JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": [1]}', "no weight_map"),
        (b'{"weight_map": {"a": 7}}', "a is in 7, which is not a file"),
        (b'{"weight_map": {"a": ""}}', "not a file"),
        (b'{"weight_map": {"a": "sub/model.safetensors"}}', "not a file"),
        (b'{"weight_map": {"a": "x\\u0000y"}}', "names files that are not there"),
        (b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}', "names files that are not there"),
        (b'{"weight_map": {"model.a": "m1.safetensors", "model.c": "m1.safetensors"}}', "lacks tensors .*: model.c"),
        (b'{"weight_map": {"model.a": "m1.safetensors", "model.b": "m2.safetensors"}}', "holds too: model.a"),
        (b'{"weight_map": {"a": "m1.safetensors", "a": "m2.safetensors"}}', "a stands twice"),
        (b"\xff", "utf-8"),
        (DEEP, "recursion"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, told):
    written(tmp_path, header())
    (tmp_path / "model.safetensors").rename(tmp_path / "m1.safetensors")
    shutil.copyfile(tmp_path / "m1.safetensors", tmp_path / "m2.safetensors")
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(ConversionError, match=told) as caught:
        read_folder(tmp_path)
    assert len(str(caught.value)) < 1000


def test_of_a_single_file_and_an_index_the_file_is_taken_as_transformers_does(converted, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(converted["qwen2"].huggingface, tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text('{"weight_map": {"model.norm.weight": "other.safetensors"}}')
    assert len(read_folder(tmp_path / "hf")) > 20
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")  # would miss other.safetensors

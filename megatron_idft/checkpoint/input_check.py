"""Are the inputs right that the flags of `train`, `score`, `realign` or `prepare` name? Asked before anything is
fetched, packed or queued, in a fraction of a second: no weights are read, and neither torch nor Megatron is imported.

A path whose parent folder is not there either may be on another machine: it is named, not refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_idft.checkpoint.checks import check_source
from megatron_idft.checkpoint.config import ModelShape, read_folder_model
from megatron_idft.checkpoint.ignored_config import named_to_ignore
from megatron_idft.checkpoint.safetensors_header import read_folder
from megatron_idft.checkpoint.tensors import pieces
from megatron_idft.errors import ArgumentError, ConversionError

_RECORDS = ("--sft-data", "--data", "--sft-valid-data")
_FOLDERS = ("--tokenizer-model", "--pretrained-checkpoint")


def check_inputs(words: Sequence[str], config_only: bool = False) -> list[str]:
    """One line on each input that `words`, the flags of a program, name. Flags that name none are passed over.

    Args:
        words: the flags.
        config_only: only config.json of the model's folder is there yet.

    Raises:
        ArgumentError: a file that is not there, or a layout that does not fit the model.
        ConversionError, InputError: a model that cannot be converted.
    """
    flags = _flags(words)
    lines = []
    for folder in flags.get("--hf-model", []):
        if not _seen("--hf-model", folder):
            lines.append(f"{folder}: not seen from here, not checked")
            continue
        model = check_model(Path(folder), config_only, named_to_ignore(words))
        _check_layout(flags, model.heads, model.groups, model.max_positions)
        tensors = "" if config_only else "; its tensors are complete"
        lines.append(f"{folder}: {_described(model)}, can be converted{tensors}")
        lines += model.ignored_lines(Path(folder) / "config.json")
    if "--hf-model" not in flags and "--num-attention-heads" in flags:
        heads = _number(flags, "--num-attention-heads", 1)
        positions = _number(flags, "--max-position-embeddings", 1 << 62)
        _check_layout(flags, heads, _number(flags, "--num-query-groups", heads), positions)
    paths = [(flag, path) for flag in (*_RECORDS, *_FOLDERS) for path in flags.get(flag, [])]
    lines += [f"{path}: not seen from here, not checked" for flag, path in paths if not _seen(flag, path)]
    return lines


def check_model(folder: Path, config_only: bool = False, ignore: Sequence[str] = ()) -> ModelShape:
    """The shape of a Hugging Face folder that can be converted: its config.json, and every tensor's name and shape.

    Args:
        folder: of the model.
        config_only: only its config.json is there yet.
        ignore: fields of config.json, as in `to_megatron`.

    Raises:
        ConversionError, InputError: as `to_megatron`, but for faults that only the weights themselves show.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder")
    model = read_folder_model(folder, ignore)
    if not config_only:
        check_source(folder, read_folder(folder), pieces(model, "gpt"), model)
    return model


def _described(model: ModelShape) -> str:
    experts = f", {model.experts} experts" if model.experts else ""
    return f"{model.family.model_type}, {model.layers} layers, {model.heads} heads in {model.groups} groups{experts}"


def _check_layout(flags: dict[str, list[str]], heads: int, groups: int, positions: int) -> None:
    tensor, length = _number(flags, "--tensor-model-parallel-size", 1), _number(flags, "--seq-length", 1)
    if heads % tensor:
        raise ArgumentError(
            f"--tensor-model-parallel-size {tensor} does not divide the {heads} attention heads of the model: use a"
            f" divisor of {heads}"
        )
    if groups % tensor and tensor % groups:
        raise ArgumentError(
            f"--tensor-model-parallel-size {tensor} does not fit the {groups} query groups of the model: use a divisor"
            f" or multiple of {groups}"
        )
    if length > positions:
        raise ArgumentError(
            f"--seq-length {length} is more than the {positions} positions of the model: use at most that"
        )


def _seen(flag: str, path: str) -> bool:
    """Whether a path is there, False if this machine may not see it.

    Raises:
        ArgumentError: it is not there, and its parent folder is.
    """
    # FILE, PREFIX of packs, PREFIX:WEIGHT and NAME=FILE.
    forms = {path, path.rpartition(":")[0], path.partition("=")[2], path.partition("=")[2].rpartition(":")[0]} - {""}
    if flag not in _RECORDS:
        forms = {path}
    if any(os.path.exists(form) or (flag in _RECORDS and os.path.exists(f"{form}.json")) for form in forms):
        return True
    if any(os.path.isdir(Path(form).absolute().parent) for form in forms):
        raise ArgumentError(f"{flag}: there is no {path}. Pass a path that this machine sees")
    return False


def _number(flags: dict[str, list[str]], flag: str, default: int) -> int:
    words = flags.get(flag)
    if not words:
        return default
    if not words[-1].isdecimal() or int(words[-1]) < 1:
        raise ArgumentError(f"{flag} {words[-1]}: pass a whole number from 1")
    return int(words[-1])


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of every flag, the last one's where it is given twice. `--flag value …` and `--flag=value`."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            values = found[flag] = [value] if equals else []
        else:
            values.append(word)
    return found

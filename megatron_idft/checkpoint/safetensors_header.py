"""The tensors of a Hugging Face folder, read from the headers of its safetensors, without torch.

The format is a JSON header with each tensor's dtype, shape and place in the file, then the bytes
(https://github.com/huggingface/safetensors, "Format"). As its own reader does, this refuses headers whose tensors do
not fill the file exactly: no overlap, no gap, no byte after the last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.config_values import shown_name
from megatron_idft.errors import ConversionError
from megatron_idft.links import refuse_links_out

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SERVED = ("F32", "F16", "BF16")
_MAX_HEADER = 100 << 20  # the format's own limit
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        dtype: the format's name of it, which may be one that is not served.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    size: int


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the shards that the index names; reads headers only.

    Raises:
        ConversionError: no safetensors there (weights in pickles are never read), or a file that is damaged.
        InputError: a file that is a link out of the folder.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, expected in _files(folder).items():
        found = read_header(file)
        lost = sorted(expected - found.keys())
        if lost:
            raise ConversionError(f"{file} lacks tensors that {INDEX} places there: {_names(lost)}")
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ConversionError(f"{file} holds tensors that another file of the folder holds too: {_names(twice)}")
        tensors |= found
    return tensors


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files, in the order in which transformers looks for them, and the tensors that each must hold."""
    files: dict[Path, set[str]] = {}
    if os.path.isfile(folder / SINGLE):
        files[folder / SINGLE] = set()
    elif os.path.isfile(folder / INDEX):
        for name, file_name in _weight_map(folder).items():
            files.setdefault(folder / file_name, set()).add(name)
        lost = sorted(file.name for file in files if not os.path.isfile(file))  # which never raises
        if lost:
            raise ConversionError(f"{folder / INDEX} names files that are not there: {_names(lost)}")
    else:
        _refuse_without_safetensors(folder)
    refuse_links_out(folder, files)
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    refuse_links_out(folder, [index])
    try:
        if index.stat().st_size > _MAX_HEADER:
            raise ValueError(f"it has {index.stat().st_size:,} bytes")
        content = _parse(index.read_bytes())
        weights = content.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ValueError("it has no weight_map")
        for name, file in weights.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
                raise ValueError(f"{shown_name(name)} is in {file!r:.200}, which is not a file of this folder")
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{index} is not an index of safetensors: {error}") from error
    except OSError as error:
        raise ConversionError(f"{index} cannot be read ({error.strerror})") from error
    return weights


def _refuse_without_safetensors(folder: Path) -> None:
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickles:
        raise ConversionError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when read"
            " and are never read here. Save the model with transformers' save_pretrained, which writes safetensors"
        )
    raise ConversionError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        ConversionError: it is not a whole and sound safetensors file; says why.
    """
    try:
        with open(path, "rb") as file:
            end = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, end - 8):
                raise ValueError(f"it would have a header of {length:,} bytes, and has {end:,} in all")
            header = _parse(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
        _refuse_gaps(tensors, 8 + length, end)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not a whole safetensors file: {str(error)[:500]}") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown_name(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{shown_name(name)} has a dtype that is no name")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{shown_name(name)} has a shape or offsets that are no lists of whole numbers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown_name(name)} has offsets that are no range")
    size = offsets[1] - offsets[0]
    if dtype in _ITEM_BYTES and size != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{shown_name(name)} has {size:,} bytes, which is not its shape and dtype {dtype}")
    return StoredTensor(path, dtype, tuple(shape), start + offsets[0], size)


def _refuse_gaps(tensors: dict[str, StoredTensor], start: int, end: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != at:
            raise ValueError(
                f"{shown_name(name)} begins at byte {tensor.begin:,}, and what is before it ends at {at:,}"
            )
        at += tensor.size
    if at != end:
        raise ValueError(f"its tensors end at byte {at:,}, and it has {end:,}")


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"{shown_name(twice)} stands twice in it")
    return result


def _names(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown_name, names[:most])) + more

"""Are the tensors there that the model needs? All that is wrong is found before the first byte is written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idft.checkpoint.config import ModelShape
from megatron_idft.checkpoint.config_values import listed
from megatron_idft.checkpoint.families import HEAD
from megatron_idft.checkpoint.model_flags import ModelClass
from megatron_idft.checkpoint.safetensors_header import SERVED, StoredTensor
from megatron_idft.checkpoint.tensors import Piece
from megatron_idft.errors import ConversionError

if TYPE_CHECKING:
    import torch

    from megatron_idft.checkpoint.safetensors_files import SafetensorsFolder


(_HEAD,) = HEAD.sources


def check_source(source: Path, tensors: dict[str, StoredTensor], plan: Iterable[Piece], model: ModelShape) -> None:
    """Refuse a Hugging Face folder whose `tensors` are not those of the plan, naming every difference."""
    expected: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, set[str]] = {}
    for piece in plan:
        for part in piece.parts:
            expected[part.name] = part.shape
            if part.name in tensors:
                dtypes.setdefault(piece.key, set()).add(tensors[part.name].dtype)
    found = {name: stored.shape for name, stored in tensors.items()}
    if model.tied:
        found.pop(_HEAD, None)  # see check_tied
    faults = _compare(expected, found, tuple(map(re.compile, model.family.ignored_tensors)))
    faults["dtypes that are not served, save the model unquantised and in one dtype"] = [
        f"{name}: {tensors[name].dtype[:40]}, only {', '.join(SERVED)} are served"
        for name in expected
        if name in found and tensors[name].dtype not in SERVED
    ] + [
        f"the tensors that make {key} have different dtypes ({', '.join(sorted(kinds))[:200]})"
        for key, kinds in dtypes.items()
        if len(kinds) > 1
    ]
    _refuse(f"{source} does not hold the tensors that its config.json implies", faults)


def check_tied(folder: SafetensorsFolder, model: ModelShape) -> None:
    """A tied model may store its one matrix twice; two matrices would be another model."""
    import torch  # noqa: PLC0415  input_check.py does without

    if not model.tied or _HEAD not in folder.tensors:
        return
    embedding = "model.embed_tokens.weight"
    stored = folder.tensors[embedding]  # which is there, as check_source says
    same = stored.shape == folder.tensors[_HEAD].shape and stored.dtype == folder.tensors[_HEAD].dtype
    rows = stored.shape[0] if same else 0
    step = 4096
    same = same and all(
        torch.equal(folder.read(_HEAD, row, min(step, rows - row)), folder.read(embedding, row, min(step, rows - row)))
        for row in range(0, rows, step)
    )
    if not same:
        raise ConversionError(
            f"{folder.folder}: config.json ties {_HEAD} to {embedding}, but both are stored and differ. Set"
            " tie_word_embeddings to false in a copy of config.json if both are meant"
        )


def check_checkpoint(
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]], plan: Iterable[Piece], folder: Path
) -> dict[str, str]:
    """The name under which each piece's tensor is stored, of those it may have.

    Args:
        stored: name -> global shape and dtype. An optimizer's tensors are passed over.
        plan: the pieces of the model.
        folder: of the checkpoint.

    Raises:
        ConversionError: the tensors are not those of the plan; names every difference.
    """
    expected: dict[str, tuple[int, ...]] = {}
    keys: dict[str, str] = {}
    accounted: set[str] = set()
    for piece in plan:
        if piece.key in keys:
            continue
        key = next((key for key in (piece.key, *piece.also) if key in stored), piece.key)
        keys[piece.key] = key
        accounted |= {piece.key, *piece.also}
        shape = piece.shape
        if len(shape) == 2 and key in stored and key.endswith(("word_embeddings.weight", "output_layer.weight")):
            # Padded for whatever tensor parallelism; the true rows must be there.
            rows = stored[key][0][0]
            shape = (max(rows, piece.parts[0].shape[0]), *shape[1:])
        expected[key] = shape
    ours = ("embedding.", "decoder.", "output_layer.", "mtp.")
    found = {
        name: shape
        for name, (shape, _) in stored.items()
        if name.startswith(ours) and (name in expected or name not in accounted)
    }
    _refuse(f"{folder} does not hold the model that config.json describes", _compare(expected, found, ()))
    return keys


def _compare(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], ignored: Iterable[re.Pattern[str]]
) -> dict[str, list[str]]:
    """The differences by kind."""
    return {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found],
        "misshapen": [
            f"{name} is {list(found[name])}, should be {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
        "unexpected": [
            f"{name[:200]} {list(shape)[:8]}"
            for name, shape in found.items()
            if name not in expected and not any(pattern.fullmatch(name) for pattern in ignored)
        ],
    }


def _refuse(title: str, faults: dict[str, list[str]]) -> None:
    """All that is wrong under one title, each kind under a heading of its own."""
    parts = [listed(f"{kind} ({len(lines)})", lines) for kind, lines in faults.items() if lines]
    if parts:
        raise ConversionError("\n".join([f"{title}.", *parts]))


def checked_model_class(args: argparse.Namespace, model: ModelShape, folder: Path) -> ModelClass:
    """The class that wrote a checkpoint with these arguments. Refuses a hybrid pattern that is another model's."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:
        return "gpt"
    layers = pattern.split("/")[0].replace("|", "")
    pair = "*E" if model.experts else "*-"
    if layers != pair * model.layers:
        raise ConversionError(
            f"{folder} is a HybridModel of layers {layers}, not {pair!r} {model.layers} times, which config.json says"
        )
    return "hybrid"

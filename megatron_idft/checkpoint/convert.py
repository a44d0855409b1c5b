"""Hugging Face safetensors folders <-> Megatron checkpoints: `to_megatron`, `to_hf`.

Both stream: one piece (a layer's tensor, an expert's, a block of vocabulary rows) is in memory at a time. Both check
every tensor's name, shape and dtype before the first byte is written, write into a temporary folder beside the
target, and rename it when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_idft.checkpoint.config import ConversionError, ModelShape, read_config, read_model
from megatron_idft.checkpoint.families import HEAD
from megatron_idft.checkpoint.safetensors_files import DTYPES, SHARD_BYTES, SafetensorsFolder, SafetensorsWriter
from megatron_idft.checkpoint.settings import (
    ModelClass,
    checkpoint_args,
    differences,
    megatron_settings,
    padded_vocabulary,
    write_flags_file,
)
from megatron_idft.checkpoint.tensors import Part, Piece, cut, extra_states, join, pieces
from megatron_idft.checkpoint.torch_dist import TRACKER, TorchDistCheckpoint, TorchDistWriter, find_iteration
from megatron_idft.data.token_cache import remove_dead_builds

COMPANIONS = "tokenizer"  # the folder of config.json and the tokenizer's files, inside a Megatron checkpoint
RECORD = "conversion.json"
# Small files of a Hugging Face folder that travel with the weights. No Python: nothing here ever runs a model's code.
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
)
_EMPTY_STATE = torch.empty(0, dtype=torch.uint8)  # Transformer Engine's sign that there is no FP8 state


def to_megatron(
    source: str | Path, target: str | Path, model_class: ModelClass = "gpt", progress: bool = True
) -> ModelShape:
    """Write the Hugging Face folder `source` as a `torch_dist` checkpoint `target` for Megatron's --load.

    The one checkpoint serves the local and the Transformer Engine layers and every parallel layout. It is a "release"
    checkpoint: it starts at iteration 0, without optimizer and random state, whether or not --finetune is given. Beside
    it lie `model_flags.sh` (the model's Megatron flags), `conversion.json` (what was made of what) and the folder
    `tokenizer` (tokenizer, config.json). Tensors keep their dtype; vocabulary padding is zeros.

    Args:
        source: a folder with config.json and safetensors, in one file or in shards with an index.
        target: does not exist yet.
        model_class: "gpt" for GPTModel, "hybrid" for HybridModel, whose layers are named otherwise.
        progress: a tqdm bar on stderr.

    Raises:
        ConversionError: naming all fields of config.json, or all tensors, that are missing, unexpected or misshapen.
    """
    source, target = Path(source), Path(target)
    config = read_config(source)
    model = read_model(config, str(source / "config.json"))
    settings = megatron_settings(model, model_class)
    folder = SafetensorsFolder(source)
    plan = list(pieces(model, model_class))
    _check_source(folder, plan, model)
    total = sum(math.prod(part.size) * _dtype(folder, part).itemsize for piece in plan for part in piece.parts)
    with new_folder(target) as building, _bar(f"to {target.name}", total, progress) as bar:
        release = building / "release"
        release.mkdir()
        with TorchDistWriter(release) as writer:
            last = torch.float32
            for piece in plan:
                if piece.parts:
                    content = join(
                        piece, [folder.read(part.name, part.start, part.rows) for part in piece.parts], model
                    )
                    last = content.dtype
                else:
                    content = torch.zeros(piece.size, dtype=last)  # padding rows follow the rows that they pad
                for key in (piece.key, *piece.also):
                    writer.tensor(key, piece.shape, piece.offset, content.reshape(piece.box))
                if piece.parts:
                    bar.update(content.numel() * content.element_size())
            for name in extra_states(model, model_class):
                writer.object(name, _EMPTY_STATE)
            writer.common_state(
                {
                    "args": checkpoint_args(model, model_class),
                    "checkpoint_version": 3.0,
                    "iteration": 0,
                    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
                }
            )
        folder.close()
        (building / TRACKER).write_text("release", encoding="utf-8")
        copy_companions(source, building / COMPANIONS)
        write_flags_file(building / "model_flags.sh", model, model_class)
        record = {
            "source": str(source.resolve()),
            "family": model.family.model_type,
            "model_class": model_class,
            "vocab_size": model.vocab,
            "padded_vocab_size": padded_vocabulary(model.vocab),
            "megatron_flags": [word for setting in settings for word in setting.words],
        }
        (building / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return model


def to_hf(
    source: str | Path,
    target: str | Path,
    companions: str | Path | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    replace: bool = False,
) -> ModelShape:
    """Write a Megatron checkpoint as a Hugging Face folder `target`: safetensors, config.json, tokenizer.

    Any `torch_dist` checkpoint of the model is read, whatever layout, layer implementation or program wrote it; an
    optimizer in it is passed over.

    Args:
        source: the checkpoint's folder (its last iteration is taken), or the folder of one iteration.
        target: does not exist yet.
        companions: the folder with the model's config.json and tokenizer. Default: `tokenizer` in the checkpoint.
        iteration: which one.
        dtype: of the tensors; None keeps the checkpoint's.
        shard_bytes: size of the largest file, unless one tensor is larger.
        progress: a tqdm bar on stderr.
        replace: a `target` that exists, once the new one is complete.

    Raises:
        ConversionError: no config.json, a model with other settings than config.json's, or tensors that are missing,
            unexpected or misshapen, all of them named.
    """
    source, target = Path(source), Path(target)
    folder = find_iteration(source, iteration)
    companion = _find_companions(source, folder, companions)
    config = read_config(companion)
    model = read_model(config, str(companion / "config.json"))
    checkpoint = TorchDistCheckpoint(folder)
    args = checkpoint.arguments()
    model_class = _model_class(args, model, folder)
    other = differences(megatron_settings(model, model_class), args)
    if other:
        raise ConversionError(
            f"{folder} was trained with other settings than {companion / 'config.json'} says, so transformers would"
            " compute something else:\n" + "\n".join(f"  - {line}" for line in other)
        )
    plan = [piece for piece in pieces(model, model_class) if piece.parts]
    stored = checkpoint.tensors()
    keys = _check_checkpoint(stored, plan, folder)
    dtypes = {piece.key: dtype or stored[keys[piece.key]][1] for piece in plan}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        part.name: (part.shape, dtypes[piece.key]) for piece in plan for part in piece.parts
    }
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    with new_folder(target, replace) as building, _bar(f"to {target.name}", total, progress) as bar:
        copy_companions(companion, building)
        name = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[name] = str(dtypes[plan[0].key]).removeprefix("torch.")
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        order = [(name, *rest) for name, rest in tensors.items()]
        with SafetensorsWriter(building, order, shard_bytes) as writer:
            for piece in plan:
                content = checkpoint.read(keys[piece.key], piece.offset, piece.box).reshape(piece.size)
                for part, tensor in zip(piece.parts, cut(piece, content, model), strict=True):
                    tensor = tensor.to(dtypes[piece.key])
                    writer.write(part.name, tensor)
                    bar.update(tensor.numel() * tensor.element_size())
    return model


# --------------------------------------------------------------------------------------------------------------- checks


def _check_source(folder: SafetensorsFolder, plan: Iterable[Piece], model: ModelShape) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, set[str]] = {}
    for piece in plan:
        for part in piece.parts:
            expected[part.name] = part.shape
            if part.name in folder.tensors:
                dtypes.setdefault(piece.key, set()).add(folder.tensors[part.name].dtype)
    found = {name: stored.shape for name, stored in folder.tensors.items()}
    (head,) = HEAD.sources
    if model.tied and head in found:
        _check_tied(folder, head)
        del found[head]
    faults = _compare(expected, found, tuple(map(re.compile, model.family.ignored_tensors)))
    faults += [
        f"{name}: dtype {folder.tensors[name].dtype}, only {', '.join(DTYPES)} are served: save the model unquantised"
        for name in expected
        if name in found and folder.tensors[name].dtype not in DTYPES
    ]
    faults += [
        f"the tensors that make {key} have different dtypes ({', '.join(sorted(kinds))}): save the model in one"
        for key, kinds in dtypes.items()
        if len(kinds) > 1
    ]
    if faults:
        raise ConversionError(_listed(f"{folder.folder} lacks the tensors that its config.json implies", faults))


def _check_tied(folder: SafetensorsFolder, head: str) -> None:
    """A tied model may store its one matrix twice; two matrices would be another model."""
    embedding = "model.embed_tokens.weight"
    stored = folder.tensors.get(embedding)
    same = stored is not None and stored.shape == folder.tensors[head].shape and stored.dtype in DTYPES
    rows = stored.shape[0] if stored is not None and same else 0
    step = 4096
    same = same and all(
        torch.equal(folder.read(head, row, min(step, rows - row)), folder.read(embedding, row, min(step, rows - row)))
        for row in range(0, rows, step)
    )
    if not same:
        raise ConversionError(
            f"{folder.folder}: config.json ties {head} to {embedding}, but both are stored and differ. Set"
            " tie_word_embeddings to false in a copy of config.json if both are meant"
        )


def _check_checkpoint(
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]], plan: Iterable[Piece], folder: Path
) -> dict[str, str]:
    """The name under which each piece's tensor is stored, of those it may have."""
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
    faults = _compare(expected, found, ())
    if faults:
        raise ConversionError(_listed(f"{folder} does not hold the model that config.json describes", faults))
    return keys


def _compare(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], ignored: Iterable[re.Pattern[str]]
) -> list[str]:
    faults = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    faults += [
        f"misshapen: {name} is {list(found[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults += [
        f"unexpected: {name} {list(shape)}"
        for name, shape in found.items()
        if name not in expected and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    return faults


def _listed(title: str, faults: list[str]) -> str:
    return f"{title}:\n" + "\n".join(f"  - {fault}" for fault in faults)


def _model_class(args: Any, model: ModelShape, folder: Path) -> ModelClass:
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


# -------------------------------------------------------------------------------------------------------------- folders


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to it at the end, and removed after an error.

    What killed conversions of this machine left beside `target` is removed too.

    Raises:
        ConversionError: `target` exists, unless it is to be replaced.
    """
    if target.exists() and not replace:
        raise ConversionError(f"{target} exists already: nothing is overwritten. Remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_builds(target.parent)
    building = target.parent / f".building-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    building.mkdir()
    try:
        yield building
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy config.json and the tokenizer's files, no weights and no code, into `target`."""
    target.mkdir(exist_ok=True)
    for pattern in _COMPANION_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                if path.name == "additional_chat_templates":
                    shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def _find_companions(source: Path, folder: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    for place in (source / COMPANIONS, folder.parent / COMPANIONS):
        if (place / "config.json").is_file():
            return place
    raise ConversionError(
        f"{source} says nothing about the Hugging Face model it is to become: pass --hf-config with the Hugging Face"
        " folder that it was converted from (its config.json and tokenizer are copied, its weights are not read)"
    )


def _dtype(folder: SafetensorsFolder, part: Part) -> torch.dtype:
    return DTYPES[folder.tensors[part.name].dtype]


def _bar(title: str, total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, desc=title, unit="B", unit_scale=True, disable=not enabled, file=sys.stderr, mininterval=1.0
    )

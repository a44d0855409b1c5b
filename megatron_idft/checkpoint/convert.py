"""Hugging Face safetensors folders <-> Megatron checkpoints: `to_megatron`, `to_hf`.

Both stream: one piece (a layer's tensor, an expert's, a block of vocabulary rows) is in memory at a time. Both check
every tensor's name, shape and dtype before the first byte is written, write into a temporary folder beside the
target, and rename it when it is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_idft.checkpoint import checksums
from megatron_idft.checkpoint.checks import check_checkpoint, check_source, check_tied, checked_model_class
from megatron_idft.checkpoint.config import ModelShape, read_config, read_folder_model, read_model
from megatron_idft.checkpoint.folders import COMPANIONS, copy_companions, find_companions, new_folder
from megatron_idft.checkpoint.model_flags import (
    ModelClass,
    checkpoint_args,
    differences,
    megatron_settings,
    padded_vocabulary,
    write_flags_file,
)
from megatron_idft.checkpoint.safetensors_files import DTYPES, SHARD_BYTES, SafetensorsFolder, SafetensorsWriter
from megatron_idft.checkpoint.tensors import Part, cut, extra_states, join, pieces
from megatron_idft.checkpoint.torch_dist import TorchDistCheckpoint, TorchDistWriter, find_iteration
from megatron_idft.console import complain
from megatron_idft.errors import ConversionError
from megatron_idft.progress import byte_bar

RECORD = "conversion.json"
_EMPTY_STATE = torch.empty(0, dtype=torch.uint8)  # Transformer Engine's sign that there is no FP8 state


def to_megatron(
    source: str | Path,
    target: str | Path,
    model_class: ModelClass = "gpt",
    progress: bool = True,
    ignore: Iterable[str] = (),
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
        ignore: fields of config.json that would be refused and, on the caller's word, change nothing that the model
            computes.

    Raises:
        ConversionError: naming all fields of config.json, or all tensors, that are missing, unexpected or misshapen.
    """
    source, target = Path(source), Path(target)
    model = read_folder_model(source, ignore)
    settings = megatron_settings(model, model_class)
    folder = SafetensorsFolder(source)
    plan = list(pieces(model, model_class))
    check_source(source, folder.tensors, plan, model)
    check_tied(folder, model)
    total = sum(math.prod(part.size) * _dtype(folder, part).itemsize for piece in plan for part in piece.parts)
    with new_folder(target) as building, byte_bar(f"converting {source.name}", total, progress) as bar:
        copy_companions(source, building / COMPANIONS)
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
        files = checksums.sum_files(release, checksums.files_of(release))
        checksums.write_record(release, checksums.Record(files, {"--hf-model": str(source.resolve())}))
        (building / checksums.TRACKER).write_text("release", encoding="utf-8")
        write_flags_file(building / "model_flags.sh", model, model_class)
        record = {
            "source": str(source.resolve()),
            "family": model.family.model_type,
            "model_class": model_class,
            "vocab_size": model.vocab,
            "padded_vocab_size": padded_vocabulary(model.vocab),
            "megatron_flags": [word for setting in settings for word in setting.words],
            "ignored": model.ignored,
            "ignored_by_user": model.ignored_by_user,
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
    verify: bool = True,
    ignore: Iterable[str] = (),
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
        verify: compare the files that are read with the checkpoint's checksums.json, where it has one.
        ignore: fields of config.json, as in `to_megatron`, beside those that the checkpoint was made without.

    Raises:
        DamagedCheckpointError: a file is not as it was saved, all of them named.
        UnsafeCheckpointError: the checkpoint names code to be run.
        ConversionError: no config.json, a model with other settings than config.json's, or tensors that are missing,
            unexpected or misshapen, all of them named.
    """
    source, target = Path(source), Path(target)
    folder = find_iteration(source, iteration)
    companion = find_companions(source, folder, companions)
    config = read_config(companion)
    checkpoint = TorchDistCheckpoint(folder, verify)
    args = checkpoint.arguments()
    before = [name for name in getattr(args, "ignore_config", None) or () if name in config]
    model = read_model(config, str(companion / "config.json"), {*ignore, *before})
    model_class = checked_model_class(args, model, folder)
    other = differences(megatron_settings(model, model_class), args)
    if other:
        raise ConversionError(
            f"{folder} was trained with other settings than {companion / 'config.json'} says, so transformers would"
            " compute something else:\n" + "\n".join(f"  - {line}" for line in other)
        )
    plan = [piece for piece in pieces(model, model_class) if piece.parts]
    stored = checkpoint.tensors()
    keys = check_checkpoint(stored, plan, folder)
    verified = checkpoint.verify(keys.values())
    if verified and progress:
        complain(f"> {folder} is verified by sizes and checksums: {verified / 1e9:.3f} GB")
    dtypes = {piece.key: dtype or stored[keys[piece.key]][1] for piece in plan}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        part.name: (part.shape, dtypes[piece.key]) for piece in plan for part in piece.parts
    }
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    with new_folder(target, replace) as building, byte_bar(f"converting {source.name}", total, progress) as bar:
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


def _dtype(folder: SafetensorsFolder, part: Part) -> torch.dtype:
    return DTYPES[folder.tensors[part.name].dtype]

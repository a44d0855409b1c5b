"""`.metadata` of a torch.distributed.checkpoint folder, which is a pickle, read without running what a pickle can run.

A pickle names functions and has them called. The unpickler here knows only the classes that torch's and Megatron's
writers put into this file, none of which does anything when it is made, and refuses every other name. They are those of
torch/distributed/checkpoint/{metadata,filesystem,planner}.py, the same from torch 2.8 to 2.15; the plans are Megatron's
`all_local_plans` (megatron/core/dist_checkpointing/strategies/state_dict_saver.py).
"""

from __future__ import annotations

import collections
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_idft.checkpoint.config_values import shown_name
from megatron_idft.errors import UnsafeCheckpointError

NAME = ".metadata"


def _member(owner: Any, name: Any) -> Any:
    """`getattr` of a member of these two enumerations, as Python 3.11 pickled it."""
    if owner not in (_MEM_FORMAT_ENCODING, planner.WriteItemType) or name not in owner.__members__:
        raise pickle.UnpicklingError("it names builtins.getattr of anything but a member of an enumeration")
    return owner[name]


_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            Metadata,
            MetadataIndex,
            TensorStorageMetadata,
            BytesStorageMetadata,
            ChunkStorageMetadata,
            TensorProperties,
            _MEM_FORMAT_ENCODING,
            dcp.StorageMeta,
            _StorageInfo,
            _StoragePrefix,
            planner.SavePlan,
            planner.WriteItem,
            planner.WriteItemType,
            planner.TensorWriteData,
            planner.BytesIOWriteData,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # of a name: TensorProperties.layout
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "getattr"): _member,
    # StorageMeta.checkpoint_id, where it was a path; Python 3.13 calls the module otherwise.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {shown_name(f'{module}.{name}')}") from None


def read_metadata(folder: Path, name: str = NAME) -> Metadata:
    """The metadata of a checkpoint's folder. Runs no code of it, and names no file outside of the folder.

    Raises:
        UnsafeCheckpointError: it holds anything but what the writers of checkpoints put there.
        FileNotFoundError: there is none.
    """
    path = Path(folder) / name
    with open(path, "rb") as file:
        try:
            metadata: Metadata = _Unpickler(file).load()
            _check(metadata)
        except Exception as error:  # a damaged pickle ends in an error of any class, from whatever it was building
            reason = str(error)[:300] or type(error).__name__
            raise UnsafeCheckpointError(
                f"{path} is not the metadata of a checkpoint and nothing else: {reason}."
                " It is damaged, or was made to run code when it is read. Copy the checkpoint again from where it came"
                " from"
            ) from error
    return metadata


def _check(metadata: Any) -> None:
    """Refuse metadata in which anything is not of the class that it should be, or lies outside of its folder."""
    _expect(metadata, Metadata, "it")
    _expect(metadata.state_dict_metadata, dict, "state_dict_metadata")
    _expect(metadata.storage_data, dict, "storage_data")
    for name, entry in metadata.state_dict_metadata.items():
        _expect(name, str, "a name")
        if not isinstance(entry, BytesStorageMetadata):
            _expect(entry, TensorStorageMetadata, shown_name(name))
            _check_tensor(name, entry)
    for index, info in metadata.storage_data.items():
        _expect(index, MetadataIndex, "a place")
        _expect(info, _StorageInfo, "a place's content")
        file = info.relative_path
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{shown_name(str(index.fqn))} is in {file!r:.200}, which is not a file of this folder")
        if not (_is_count(info.offset) and _is_count(info.length)):
            raise ValueError(f"{shown_name(str(index.fqn))} has no place in {file!r:.200}")


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    _expect(entry.properties, TensorProperties, shown_name(name))
    _expect(entry.properties.dtype, torch.dtype, f"the dtype of {shown_name(name)}")
    _expect(entry.chunks, list, f"the chunks of {shown_name(name)}")
    sizes = [entry.size]
    for chunk in entry.chunks:
        _expect(chunk, ChunkStorageMetadata, f"a chunk of {shown_name(name)}")
        sizes += [chunk.offsets, chunk.sizes]
    for size in sizes:
        if not isinstance(size, torch.Size) or len(size) != len(entry.size) or any(number < 0 for number in size):
            raise ValueError(f"{shown_name(name)} has a shape that is none")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expect(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of class {type(value).__name__}, should be {kind.__name__}")

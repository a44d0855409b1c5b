"""Megatron's `torch_dist` checkpoints, written and read piece by piece, in one process without a process group.

The files are those of torch.distributed.checkpoint (torch/distributed/checkpoint/{filesystem,metadata}.py): each piece
is a `torch.save` of its own, one after the other in `__0_N.distcp`, and `.metadata` says which box of which tensor lies
where. Megatron adds `metadata.json` and keeps what is not a tensor as one object `common_state`
(megatron/core/dist_checkpointing/serialization.py). torch's own `save` is not used because its writer holds on to the
last piece of every tensor name until the file is closed (`tensor_dict` in `_write_files_from_queue`), which for
HybridModel's names is the whole model.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_idft.checkpoint.checksums import RECORD, TRACKER, iteration_folder, problems, read_record, read_tracker
from megatron_idft.checkpoint.dcp_metadata import NAME, read_metadata
from megatron_idft.errors import ConversionError, DamagedCheckpointError
from megatron_idft.files import sync, synced_file

_COMMON = "common_state/shard_0_1"
_FILE_BYTES = 4 << 30  # a file is closed when it has grown beyond this


class TorchDistWriter:
    """Writes a checkpoint into `folder`, which exists and is empty. A context manager: the end writes the metadata."""

    def __init__(self, folder: Path, file_bytes: int = _FILE_BYTES):
        self._folder = folder
        self._file_bytes = file_bytes
        self._files = 0
        self._file: IO[bytes] | None = None
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def tensor(self, key: str, shape: Sequence[int], offset: Sequence[int], content: Tensor) -> None:
        """Write one box of the tensor `key`: `content` (all axes of `shape`) belongs at `offset`."""
        # A view of a larger storage would be saved with all of it.
        if content.untyped_storage().nbytes() != content.numel() * content.element_size():
            content = content.clone()
        at, size = torch.Size(offset), content.size()
        if key not in self._entries:
            properties = TensorProperties.create_from_tensor(content)
            self._entries[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
        entry = self._entries[key]
        index = MetadataIndex(key, at, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(at, size))
        self._store(index, content)

    def object(self, key: str, content: Any) -> None:
        """Write an object under the unique key of a `ShardedObject`, as Megatron does: in a list."""
        self._entries[key] = BytesStorageMetadata()
        self._store(MetadataIndex(key), [content])

    def common_state(self, state: dict[str, Any]) -> None:
        """Write what Megatron calls the common state: arguments, iteration, versions."""
        self.object(_COMMON, state)

    def _store(self, index: MetadataIndex, content: Any) -> None:
        if self._file is not None and self._file.tell() > self._file_bytes:
            self._close_file()
        if self._file is None:
            self._file = open(self._folder / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115  see _close_file
            self._files += 1
        begin = self._file.tell()
        torch.save(content, self._file)
        self._storage[index] = _StorageInfo(Path(self._file.name).name, begin, self._file.tell() - begin)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))
            self._file = None

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_file()
        if kind is not None:
            return
        metadata = Metadata(self._entries, storage_data=self._storage)
        with synced_file(self._folder / ".metadata", "wb") as file:
            pickle.dump(metadata, file)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")


class TorchDistCheckpoint:
    """One iteration's folder of a checkpoint, open for reading.

    The metadata is a pickle and read as `dcp_metadata.py` says; everything else is loaded with torch's `weights_only`.
    Where checksums.json lies in the folder, each file is compared with it before it is read.

    Args:
        verify: False for a checkpoint that this process has just saved and summed.

    Raises:
        ConversionError: not a torch_dist checkpoint.
        DamagedCheckpointError: a file is not as it was saved.
        UnsafeCheckpointError: the metadata names what no writer of checkpoints does.
    """

    def __init__(self, folder: Path, verify: bool = True):
        self.folder = folder
        self._record = read_record(folder) if verify else None
        self._verified: set[str] = set()
        small = [name for name in (NAME, "metadata.json", "common.pt") if (folder / name).is_file()]
        self._verify(small)
        try:
            backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConversionError(
                f"{folder} is not a torch_dist checkpoint ({error}): save with --ckpt-format torch_dist"
            ) from error
        if backend != "torch_dist":
            raise ConversionError(f"{folder} has the format {str(backend)[:60]}: save with --ckpt-format torch_dist")
        if not (folder / NAME).is_file():
            raise ConversionError(f"{folder} is half-written, its save did not end: it has no {NAME}")
        self._reader = FileSystemReader(folder)
        self._metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def verify(self, keys: Iterable[str]) -> int:
        """Compare the files that hold these tensors or objects with the record; the bytes that are compared by now.

        Raises:
            DamagedCheckpointError: naming every file that has changed.
        """
        wanted = set(keys)
        stored = self._metadata.storage_data.items()
        files = sorted({info.relative_path for index, info in stored if index.fqn in wanted})
        lost = [name for name in files if not (self.folder / name).is_file()]
        if lost:
            raise DamagedCheckpointError(
                f"{self.folder} lacks {', '.join(lost[:8])}: copy it again from where it came from"
            )
        self._verify(files)
        return 0 if self._record is None else sum(self._record.files[name].size for name in self._verified)

    def _verify(self, names: Sequence[str]) -> None:
        if self._record is None:
            return
        names = [name for name in names if name not in self._verified]
        self._verified |= {*names}
        unknown = [name for name in names if name not in self._record.files]
        wrong = [f"{self.folder.name}/{name}: not in {RECORD}" for name in unknown]
        wrong += problems(self.folder, {name: self._record.files[name] for name in names if name not in unknown})
        if wrong:
            raise DamagedCheckpointError(
                f"{self.folder} is damaged: {'; '.join(wrong[:8])}. Copy it again from where it came from, or take"
                " another iteration"
            )

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> global shape and dtype of every tensor."""
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` of a tensor, put together from whatever chunks a layout has saved it in."""
        entry = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[key])
        result = torch.empty(tuple(size), dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(key, entry, [box])
        if sum(item.lengths.numel() for item in items) != result.numel():
            raise ConversionError(f"{self.folder}: {key} is not complete: saved chunks do not cover {offset} + {size}")
        # torch's reader speaks to a planner: where shall this item go, and it has come.
        with self._explained(key):
            self._reader.read_data(LoadPlan(items), _Box(result))  # type: ignore[arg-type]
        return result

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """torch's errors on content that it cannot read have many classes, and name no file."""
        try:
            yield
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            files = sorted(
                {info.relative_path for index, info in self._metadata.storage_data.items() if index.fqn == key}
            )
            name = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it names {name[1]}" if name else (str(error).splitlines() or [type(error).__name__])[0]
            raise ConversionError(
                f"{self.folder}: {key[:200]}, in {', '.join(files[:4]) or 'no file'}, cannot be read: {reason[:300]}"
            ) from error

    def arguments(self) -> argparse.Namespace:
        """Megatron's arguments as recorded; empty if there are none.

        Megatron wrote them into `common.pt` before 0.19.
        """
        # Importing it registers the classes that a common state may hold.
        from megatron.core.dist_checkpointing import serialization  # noqa: F401

        if (self.folder / "common.pt").is_file():
            with self._explained("common.pt"):
                state = torch.load(self.folder / "common.pt", map_location="cpu", weights_only=True)
        elif _COMMON in self._metadata.state_dict_metadata:
            self.verify([_COMMON])
            content = _Bytes()
            item = ReadItem(
                LoadItemType.BYTE_IO,
                MetadataIndex(_COMMON),
                torch.Size((0,)),
                MetadataIndex(_COMMON),
                torch.Size((0,)),
                torch.Size((0,)),
            )
            with self._explained(_COMMON):
                self._reader.read_data(LoadPlan([item]), content)  # type: ignore[arg-type]
                state = torch.load(content.data, map_location="cpu", weights_only=True)[0]
        else:
            state = {}
        args = state.get("args") if isinstance(state, dict) else None
        return args if isinstance(args, argparse.Namespace) else argparse.Namespace()


def check_pickles(folder: Path) -> None:
    """Read what a checkpoint of any format has besides tensors, of which Megatron would make objects.

    Raises:
        UnsafeCheckpointError, ConversionError: it names code, or is damaged.
    """
    if not (folder / NAME).is_file():
        return
    if (folder / "metadata.json").is_file() and '"torch_dist"' in (folder / "metadata.json").read_text(
        "utf-8", "replace"
    ):
        TorchDistCheckpoint(folder, verify=False).arguments()
    else:
        read_metadata(folder)


class _Box:
    """The part of torch's LoadPlanner that reading into one tensor takes."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        view = self._target
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None: ...


class _Bytes:
    data: io.BytesIO

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.data = value


def find_iteration(folder: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration: `folder` itself, the one named by its tracker file, or that of `iteration`.

    Raises:
        ConversionError: there is none.
        DamagedCheckpointError: the tracker file does not name one.
    """
    if iteration is not None:
        found = folder / f"iter_{iteration:07d}"
    elif (folder / "metadata.json").is_file():
        return folder
    elif (last := read_tracker(folder)) is not None:
        found = iteration_folder(folder, last)
    else:
        raise ConversionError(f"{folder} is not a Megatron checkpoint: it has neither {TRACKER} nor metadata.json")
    if not found.is_dir():
        kept = sorted(path.name for path in folder.glob("iter_*"))
        raise ConversionError(f"there is no checkpoint {found}; there are {', '.join(kept) or 'none'}")
    return found

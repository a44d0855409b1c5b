"""A checkpoint's pickles are read without running what they name, by the conversion and by Megatron's own reader."""

import collections
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata

from megatron_idft.checkpoint.checksums import RECORD
from megatron_idft.checkpoint.convert import to_hf
from megatron_idft.checkpoint.dcp_metadata import read_metadata
from megatron_idft.checkpoint.torch_dist import TorchDistWriter
from megatron_idft.errors import DamagedCheckpointError, UnsafeCheckpointError, UserError


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args: Any):
        self._call = function, args

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        return self._call


@pytest.fixture
def checkpoint(converted, tmp_path) -> Path:
    """A private copy of a checkpoint without its checksums, as somebody else would hand it over."""
    shutil.copytree(converted["qwen2"].megatron["gpt"], tmp_path / "megatron")
    (tmp_path / "megatron" / "release" / RECORD).unlink()
    return tmp_path / "megatron"


def crafted(mark: Path) -> dict[str, Any]:
    """What stands in .metadata: calls that would leave `mark`, and data that is none."""
    touch = f"touch {mark}"
    sound = Metadata({}, storage_data={})
    return {
        "system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Call(getattr, Metadata, "system"),
        "method of an admitted class": Call(getattr, Metadata, "__init__"),
        "within": Metadata({}, planner_data=Call(os.system, touch), storage_data={}),
        "torch": Call(torch.hub.load, str(mark), "x"),
        "partial": Call(collections.Counter, "aab"),
        "a class": Metadata,
        "a number": 7,
        "entries that are none": Metadata({"a": 7}, storage_data={}),
        "no storage": Metadata({}),
        "sound in itself": [sound, Call(os.system, touch)],
    }


KINDS = list(crafted(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_crafted_metadata_file_runs_nothing(checkpoint, tmp_path, kind):
    mark = tmp_path / "mark"
    path = checkpoint / "release" / ".metadata"
    path.write_bytes(pickle.dumps(crafted(mark)[kind]))
    with pytest.raises(
        UnsafeCheckpointError, match=r"release/\.metadata is not the metadata of a checkpoint"
    ) as caught:
        to_hf(checkpoint, tmp_path / "out", progress=False)
    told = {
        "system": "posix.system",
        "eval": "builtins.eval",
        "within": "posix.system",
        "partial": "collections.Counter",
    }
    assert told.get(kind, "") in str(caught.value) and len(str(caught.value)) < 1000
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_no_file_outside_of_the_folder_is_named(checkpoint):
    release = checkpoint / "release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    for place in ("/etc/passwd", "../x.distcp", "..", "", 7, "a/b"):
        next(iter(metadata.storage_data.values())).relative_path = place
        (release / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UnsafeCheckpointError, match="not a file of this folder"):
            read_metadata(release)


@pytest.mark.parametrize("protocol", [4, 5])  # the defaults of Python 3.8 to 3.13, and from 3.14
def test_every_class_that_a_writer_uses_is_admitted(checkpoint, protocol):
    """Also what others write: Python 3.11's members of an enumeration, a path, mappings, Megatron's own attribute."""
    release = checkpoint / "release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    metadata.storage_meta = torch.distributed.checkpoint.metadata.StorageMeta(checkpoint_id=Path("/a/b"), save_id="x")
    metadata.planner_data = collections.OrderedDict(a=("b", 0))
    metadata.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (1, 2)}}
    metadata.version = "1.0.0"
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    tensor = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    index = next(iter(metadata.storage_data))
    data = planner.TensorWriteData(tensor.chunks[0], tensor.properties, tensor.size)
    items = [planner.WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data)]
    items += [planner.WriteItem(index, planner.WriteItemType.BYTE_IO, bytes_io_data=planner.BytesIOWriteData(7))]
    metadata.all_local_plans = [planner.SavePlan(items, _StoragePrefix("__0_"), {"a": ("b",)})]
    metadata.planner_data["older"] = Call(getattr, encoding, "TORCH_CONTIGUOUS_FORMAT")
    (release / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    found = read_metadata(release)
    assert found.state_dict_metadata == metadata.state_dict_metadata and found.storage_data == metadata.storage_data
    assert found.all_local_plans == metadata.all_local_plans
    assert found.mcore_data == metadata.mcore_data and str(found.storage_meta.checkpoint_id) == "/a/b"
    assert found.planner_data["older"] is encoding.TORCH_CONTIGUOUS_FORMAT


def test_the_arguments_run_nothing_either(checkpoint, tmp_path):
    """An object among the tensors, and the common.pt of older checkpoints."""
    mark = tmp_path / "mark"
    torch.save({"args": Call(os.system, f"touch {mark}")}, checkpoint / "release" / "common.pt")
    with pytest.raises(UserError, match=r"common.pt.* cannot be read: it names posix.system"):
        to_hf(checkpoint, tmp_path / "out", progress=False)
    (checkpoint / "release" / "common.pt").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"common.pt.* cannot be read"):
        to_hf(checkpoint, tmp_path / "out", progress=False)
    (tmp_path / "other").mkdir()
    with TorchDistWriter(tmp_path / "other") as writer:
        writer.common_state({"args": Call(os.system, f"touch {mark}")})
    with pytest.raises(UserError, match=r"common_state.*__0_0.distcp, cannot be read: it names posix.system"):
        to_hf(tmp_path / "other", tmp_path / "out", checkpoint / "tokenizer", progress=False)
    assert not mark.exists()


def test_megatrons_own_reader_runs_nothing(checkpoint, tmp_path, monkeypatch):
    """Its metadata, and the objects that torch's planner unpickles for it without limits."""
    from megatron.core.dist_checkpointing import serialization
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    from megatron_idft.integration.platform.restricted_loading import restrict_checkpoint_reading

    for owner, name in ((FileSystemReader, "read_metadata"), (DefaultLoadPlanner, "load_bytes")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # given back after the test
    restrict_checkpoint_reading()
    restrict_checkpoint_reading()
    assert serialization.load_common_state_dict(checkpoint / "release")["args"].hidden_size == 64
    mark = tmp_path / "mark"
    (tmp_path / "other").mkdir()
    with TorchDistWriter(tmp_path / "other") as writer:
        writer.common_state({"args": Call(os.system, f"touch {mark}")})
    with pytest.raises(CheckpointException, match=r"common_state/shard_0_1 names posix.system"):
        serialization.load_common_state_dict(tmp_path / "other")
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    copy = shutil.copytree(checkpoint / "release", tmp_path / "copy")  # Megatron remembers metadata by path
    with pytest.raises(CheckpointException, match=r"it names posix\.system"):
        serialization.load_common_state_dict(copy)
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["bit", "cut", "lost", "metadata", "record"])
def test_damage_is_found_before_anything_is_written(converted, tmp_path, damage):
    checkpoint = shutil.copytree(converted["qwen2"].megatron["gpt"], tmp_path / "megatron")
    release = checkpoint / "release"
    assert (release / RECORD).is_file()
    path = release / {"metadata": ".metadata", "record": RECORD}.get(damage, "__0_0.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(DamagedCheckpointError) as caught:
        to_hf(checkpoint, tmp_path / "out", progress=False)
    assert path.name in str(caught.value) and not (tmp_path / "out").exists()

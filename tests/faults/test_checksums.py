"""The record of a checkpoint's files: what it finds, and how its work is shared among ranks."""

import json
import os
import random

import pytest

from megatron_idft.checkpoint import checksums
from megatron_idft.checkpoint.checksums import FileEntry, Record
from megatron_idft.errors import DamagedCheckpointError


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of three ranks, recorded."""
    folder = tmp_path / "iter_0000020"
    folder.mkdir()
    rng = random.Random(1)
    for name, size in (("__0_0.distcp", 300), ("__1_0.distcp", 5000), ("__2_1.distcp", 40), (".metadata", 70)):
        (folder / name).write_bytes(rng.randbytes(size))
    (folder / "metadata.json").write_text("{}")
    files = {}
    for rank in range(3):
        files |= checksums.sum_files(folder, checksums.share_to_record(checksums.files_of(folder), rank))
    checksums.write_record(folder, Record(files, {"--load": "base"}))
    return folder


def test_ranks_record_every_file_once_and_what_they_wrote_themselves(saved):
    files = checksums.files_of(saved)
    shares = [checksums.share_to_record(files, rank) for rank in range(3)]
    assert shares == [[".metadata", "__0_0.distcp", "metadata.json"], ["__1_0.distcp"], ["__2_1.distcp"]]
    record = checksums.read_record(saved)
    assert sorted(record.files) == files and record.begun_with == {"--load": "base"}
    assert record.size == sum((saved / name).stat().st_size for name in files)


def test_verification_is_shared_by_bytes_whatever_the_number_of_ranks():
    rng = random.Random(2)
    files = {f"__{n}_0.distcp": FileEntry(rng.randrange(1, 10**9), 0) for n in range(97)}
    for ranks in (1, 2, 7, 200):
        shares = [checksums.share_to_verify(files, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(files)
        burdens = sorted(sum(entry.size for entry in share.values()) for share in shares)
        assert burdens[-1] - burdens[0] <= max(entry.size for entry in files.values())


def test_every_kind_of_damage_is_named_and_nothing_else(saved):
    files = checksums.read_record(saved).files
    assert checksums.problems(saved, files) == []
    os.truncate(saved / "__1_0.distcp", 4999)
    content = bytearray((saved / "__0_0.distcp").read_bytes())
    content[299] ^= 1
    (saved / "__0_0.distcp").write_bytes(content)
    (saved / ".metadata").unlink()
    found = sorted(checksums.problems(saved, files))
    assert found == [
        "iter_0000020/.metadata: missing",
        "iter_0000020/__0_0.distcp: its content has changed since it was saved (checksum differs)",
        "iter_0000020/__1_0.distcp: 4999 bytes, 5000 were saved",
    ]
    assert len(checksums.problems(saved, files, contents=False)) == 2, "sizes alone do not show the flipped bit"
    aside = [checksums.set_aside(saved)]
    saved.mkdir()
    aside.append(checksums.set_aside(saved))
    assert [path.name for path in aside] == ["iter_0000020.damaged", "iter_0000020.damaged-2"]
    assert checksums.saved_iterations(saved.parent) == []


def test_a_record_or_tracker_that_cannot_be_read_is_damage_and_none_is_none(saved):
    (saved / "checksums.json").write_text('{"version": 1, "files": {"a": ')
    with pytest.raises(DamagedCheckpointError, match=r"iter_0000020/checksums.json: cannot be read"):
        checksums.read_record(saved)
    (saved / "checksums.json").write_text('{"version": 9}')
    with pytest.raises(DamagedCheckpointError, match="update megatron-idft"):
        checksums.read_record(saved)
    for name in ("../iter_0000010/.metadata", "/etc/passwd"):
        record = {"version": 1, "begun_with": {}, "files": {name: [1, 2]}}
        (saved / "checksums.json").write_text(json.dumps(record))
        with pytest.raises(DamagedCheckpointError, match="outside of its folder"):
            checksums.read_record(saved)
    assert checksums.is_complete(saved)
    checksums.begin_writing(saved)
    assert checksums.read_record(saved) is None and not checksums.is_complete(saved)
    home = saved.parent
    assert checksums.read_tracker(home) is None
    checksums.write_tracker(home, 20)
    assert checksums.read_tracker(home) == 20 and [path.name for path in home.iterdir() if path.is_file()] == [
        "latest_checkpointed_iteration.txt"
    ]
    for content in (b"\0\0", b"9" * 5000):
        (home / "latest_checkpointed_iteration.txt").write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match="names no iteration"):
            checksums.read_tracker(home)

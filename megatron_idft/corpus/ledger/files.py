"""Files of a ledger's folder: their names, how they get them, and what is said when the folder does not work."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_idft.errors import LedgerError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def part_name(chunk: int, suffix: str) -> str:
    return f"chunk-{chunk:06d}{suffix}"


def finished_parts(folder: Path, suffix: str) -> dict[int, Path]:
    """Chunk -> its part, in the order of the chunks."""
    name = re.compile(r"chunk-(\d{6,})" + re.escape(suffix))
    found = {int(match[1]): folder / entry for entry in os.listdir(folder) if (match := name.fullmatch(entry))}
    return dict(sorted(found.items()))


@contextmanager
def plain_errors(folder: Path, attempt: str, foreign_code: bool = False) -> Iterator[None]:
    """Turn errors of the operating system into LedgerErrors that name the remedy.

    Args:
        foreign_code: other people's code runs here; only a full disk and missing rights in the folder are our concern.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(folder))
        if foreign_code and (elsewhere or error.errno not in _NO_SPACE | _NOT_WRITABLE):
            raise
        if error.errno in _NO_SPACE:
            remedy = "free some space (or raise the quota) and start again: finished parts are kept"
        elif error.errno in _NOT_WRITABLE:
            remedy = "make the folder writable, or name another one"
        else:
            remedy = "is the file system available, and the path a folder?"
        raise LedgerError(f"{folder}: cannot {attempt}: {error}; {remedy}") from error

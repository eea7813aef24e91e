"""Files that are either there whole or not there at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.errors import HistoryError

TEMPORARY = ".tmp"
"""Suffix of a file that is being written; left over after a crash, and then worth nothing."""


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `path` so that a crash at any moment leaves the old content or the new, and on return the new.

    The order is what makes it safe: the bytes reach the disk before the name does, and the name before
    this returns. Raises OSError; nothing but a temporary file can then be left.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; the system may take it in pieces."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make created, renamed and removed names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` durably; one that exists is fine."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def sweep(folder: Path) -> None:
    """Remove what writers that died left half-written. Only for the one writer of the folder."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error says, or was raised because of one that says, that the disk takes no more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__
    return False


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn OSError into HistoryError that says what could not be done, and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise HistoryError(f"{what}: the disk is full; make room and resume the run") from error
        raise HistoryError(f"{what}: {error.strerror or error}; repair that and resume the run") from error

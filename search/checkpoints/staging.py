"""The folder in which a model is made before it gets its name, and what a killed process left of one.

Its maker holds a lock on it, which ends with the process; so a later writer knows what nobody works on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL, REPLACED = "partial", "replaced"


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which is gone afterwards unless it was renamed; old ones go now.

    Raises:
        OSError: no folder can be made there.
    """
    remove_leftovers(out)
    folder, lock = _locked_folder(out)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def move_into_place(staging: Path, out: Path) -> None:
    """Rename the finished folder. One that is replaced steps aside first, and comes back if that fails."""
    if out.exists() and any(out.iterdir()):
        aside = out.parent / f".{out.name}.{REPLACED}-{secrets.token_hex(4)}"
        lock = _lock(out)
        try:
            out.rename(aside)
            try:
                staging.rename(out)
            except OSError:
                aside.rename(out)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)
    else:
        staging.rename(out)
    sync_folder(out.parent)


def remove_leftovers(out: Path) -> None:
    """Remove what processes that are dead left beside `out`, and put back a model that they moved aside."""
    for kind in (PARTIAL, REPLACED):
        for folder in sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*")):
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                if kind == REPLACED and not out.exists():
                    folder.rename(out)  # killed between its two renames: the old model is whole
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = out.parent / f".{out.name}.{PARTIAL}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # as below, a moment earlier
        # A file system without locks: nobody will take the folder for a leftover, they cannot lock it either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked


def _lock(folder: Path) -> int | None:
    """The lock of a folder, or None where another process holds it or there are no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

"""The folder of a node in which copies of models and data are kept that its workers cannot see otherwise.

`shards` in the folder that `MEIOSIS_CACHE` names, or in the user's cache folder. A copy is a folder named by its
content; beside it lies a lock that every process that uses it shares. Only one process of a node makes or removes
copies at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.parcels import Parcel, this_node
from cluster.shards import node_folder
from search.checkpoints.fingerprint_cache import cache_folder
from search.errors import WorkerError
from search.memory_sizes import gib

ABOUT = "about.json"
PARTIAL = ".partial"
SPARE_BYTES = 1 << 30
SPARE_SHARE = 0.05
"""So much of a disk, the lesser of the two, is never filled with copies."""


@dataclass(frozen=True)
class Copy:
    """One copy, or what a transfer that was cut off left of one.

    Attributes:
        key: name of its folder.
        what: what it is, for people.
        nbytes: its size on disk.
        used_at: when a process last began to use it, seconds since 1970.
        in_use: whether one uses it now.
    """

    key: str
    what: str
    nbytes: int
    used_at: float
    in_use: bool


class Copies:
    """The copies of this node.

    Args:
        folder: where they are; by default as the module says. Made when the first copy is.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self._used: dict[str, IO[str]] = {}

    @contextmanager
    def alone(self, *, wait: bool = True) -> Iterator[None]:
        """Be the only process of this node that makes or removes copies.

        Raises:
            WorkerError: the folder cannot be made; without `wait`, another process is at it.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("a")
        except OSError as error:
            raise WorkerError(
                f"{this_node()}: {self.folder}: cannot be used for copies of models ({error.strerror}); set "
                "MEIOSIS_CACHE on this node to a folder that can be written"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise WorkerError(f"{self.folder}: a copy is being made there; try again when it is done") from error
            yield

    def place(self, parcel: Parcel) -> Path:
        """Where the copy of a parcel is, if there is one."""
        return self.folder / parcel.key / Path(parcel.path).name

    def partial(self, parcel: Parcel) -> Path:
        """Where it is while it is made."""
        return self.folder / f"{parcel.key}{PARTIAL}" / Path(parcel.path).name

    def publish(self, parcel: Parcel) -> None:
        """Give a copy that is whole its name."""
        partial = self.partial(parcel).parent
        about = {"what": parcel.what, "from": parcel.path, "bytes": parcel.nbytes}
        (partial / ABOUT).write_text(json.dumps(about))
        self.remove(parcel.key)
        partial.rename(self.folder / parcel.key)

    def use(self, parcel: Parcel) -> None:
        """Note that this process uses a copy until it ends."""
        if parcel.key not in self._used:
            lock = self._lock(parcel.key)
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._used[parcel.key] = lock
        os.utime(self.folder / f"{parcel.key}.lock")

    def remove(self, key: str) -> None:
        """Remove a copy, or what is there of one; processes that have its files mapped keep them."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def listing(self) -> list[Copy]:
        """All copies, the one that was used last at the end."""
        found = []
        for folder in self.folder.glob("*") if self.folder.is_dir() else ():
            if folder.is_dir():
                partial = folder.name.endswith(PARTIAL)
                used_at, in_use = self._use_of(folder)
                what = "a transfer that was cut off" if partial else _about(folder)
                found.append(Copy(folder.name, what, _size(folder), used_at, in_use))
        return sorted(found, key=lambda copy: copy.used_at)

    def clear(self) -> list[Copy]:
        """Remove what nobody uses; returns what was removed. Only inside `alone`."""
        removed = [copy for copy in self.listing() if not copy.in_use]
        for copy in removed:
            self._forget(copy)
        return removed

    def make_room(self, nbytes: int, keep: Collection[str]) -> list[Copy]:
        """See that so many more bytes fit on the disk, if need be without the copies that were not used longest.

        Args:
            nbytes: what is to be written.
            keep: folders that stay, though nobody uses them yet.

        Returns:
            What was removed. Only inside `alone`.

        Raises:
            WorkerError: they do not fit.
        """
        removed = []
        for copy in [None, *self.listing()]:
            if copy is not None:
                if copy.in_use or copy.key in keep:
                    continue
                self._forget(copy)
                removed.append(copy)
            if nbytes <= self.room():
                return removed
        raise WorkerError(
            f"{this_node()}: {self.folder} has room for {gib(max(0, self.room()))} and needs {gib(nbytes)} for copies "
            "of models that this node does not see; make room there, or set MEIOSIS_CACHE on this node to a folder on "
            "a larger disk, or put the models where all nodes see them"
        )

    def room(self) -> int:
        """Bytes that copies may still fill; negative where less than the spare part of the disk is free."""
        disk = shutil.disk_usage(self.folder)
        return disk.free - min(SPARE_BYTES, int(SPARE_SHARE * disk.total))

    def _forget(self, copy: Copy) -> None:
        self.remove(copy.key)
        (self.folder / f"{copy.key}.lock").unlink(missing_ok=True)

    def _lock(self, key: str) -> IO[str]:
        return (self.folder / f"{key}.lock").open("a")

    def _use_of(self, folder: Path) -> tuple[float, bool]:
        path = folder.with_name(f"{folder.name}.lock")
        if not path.exists():
            return folder.stat().st_mtime, False
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return path.stat().st_mtime, True
        return path.stat().st_mtime, False


def default_folder() -> Path:
    """Where this node keeps copies."""
    try:
        return cache_folder() / "shards"
    except RuntimeError:  # no home
        return node_folder() / "shards"


def age(copy: Copy) -> str:
    """How long ago a copy was used, for people."""
    hours = max(0.0, time.time() - copy.used_at) / 3600
    return f"{hours / 24:.0f} days ago" if hours >= 48 else f"{hours:.1f} hours ago"


def _about(folder: Path) -> str:
    try:
        return str(json.loads((folder / ABOUT).read_text())["what"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _size(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_dir())

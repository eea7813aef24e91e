"""A lock on a file that ends with its process, however the process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from weakref import WeakSet

from search.errors import RunError

LOCK = "lock"
"""Name of the lock file in a folder that has one."""

PATIENCE_SECONDS = 0.5
"""How long to try: a process that was just killed, or one that just looked, lets go by then."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as written into the file by the holder."""

    pid: int
    host: str
    started: str


class FileLock:
    """An exclusive `flock` on `path`, a file kept for it. A context manager.

    The file is never removed: a name that comes and goes would let two processes lock two files.

    Args:
        path: the lock file; created when it is not there.
        what: what is locked, for the message: `run 'first'`.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: another process has it (or this one, by another object), or the file system
                cannot lock.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(f"{self.what}: cannot open the lock {self.path}: {error.strerror}") from error
        try:
            self._lock(descriptor)
            owner = Owner(os.getpid(), socket.gethostname(), datetime.now().astimezone().isoformat(" ", "seconds"))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _HELD.add(self)

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise RunError(self._refusal()) from error
            except OSError as error:
                raise RunError(
                    f"{self.what}: the file system of {self.path} cannot lock files ({error.strerror}); "
                    "put the run on one that can"
                ) from error
            return

    def _refusal(self) -> str:
        owner = self._written()
        who = f"process {owner.pid} on {owner.host} since {owner.started}" if owner else "another process"
        return f"{self.what} is in use by {who}; stop it first"

    def _written(self) -> Owner | None:
        try:
            return Owner(**json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def owner(self) -> Owner | None:
        """Who holds the lock now, or None when nobody does. Changes nothing."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return self._written()
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Give the lock back. May be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _HELD.discard(self)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _forget(self) -> None:
        """In a forked child: close our copy, which would keep the lock alive after the parent's death."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_HELD: WeakSet[FileLock] = WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()
    _HELD.clear()


_register: Callable[..., None] = os.register_at_fork
_register(after_in_child=_forget_all)

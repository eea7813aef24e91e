"""Progress of work on many bytes: a few lines where it takes a while, or a meter that somebody draws."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

QUIET_BYTES = 1 << 30
"""Work on less than this takes about a second and is not worth a line."""


class ByteProgress:
    """Counts bytes from any thread and reports a line for every tenth.

    Args:
        what: how a line begins, such as `hashing models/base`.
        total: bytes of the whole work.
        report: gets the lines, from one thread at a time.
    """

    def __init__(self, what: str, total: int, report: Callable[[str], None] | None) -> None:
        self._what, self._total = what, total
        self._report = report if total >= QUIET_BYTES else None
        self._done = self._tenths = 0
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        """Note that so many more bytes are done."""
        with self._lock:
            self._done += nbytes
            tenths = 10 * self._done // max(1, self._total)
            if self._report is not None and tenths > self._tenths:
                self._tenths = tenths
                self._report(f"{self._what}: {10 * tenths}% of {self._total / 2**30:.1f} GiB")


class Meter(Protocol):
    """Who is told how far the writing of a model is. Calls come from one thread at a time."""

    def start(self, tensors: int, nbytes: int) -> None:
        """So much will be written."""

    def wrote(self, nbytes: int) -> None:
        """One more tensor, of so many bytes, is written."""


class NoMeter:
    """A `Meter` that nobody looks at."""

    def start(self, tensors: int, nbytes: int) -> None: ...

    def wrote(self, nbytes: int) -> None: ...


class Stopped(Exception):  # noqa: N818 - not a fault: it ends threads whose work nobody wants any more
    """Raised in a thread that reports progress after its work was called off."""


class Advance(Protocol):
    """Who is told, from any thread, that so many more bytes are done."""

    def advance(self, nbytes: int) -> None: ...


class StopSwitch:
    """An `Advance` that ends the work at the next report after `stop`."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def advance(self, nbytes: int) -> None:
        """Raise `Stopped` if the work is not wanted any more."""
        if self._stopped.is_set():
            raise Stopped

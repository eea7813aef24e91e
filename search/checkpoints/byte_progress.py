"""Lines of progress for work on many bytes: none where it is over at once, about ten where it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable

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

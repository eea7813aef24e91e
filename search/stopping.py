"""Stopping cleanly: signals become a question that the driver asks where it is safe to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests(report: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C and SIGTERM only set what the yielded function returns.

    A second Ctrl-C raises `KeyboardInterrupt` at once: what is recorded stays recorded, a record that is
    being written is taken back. Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    asked = said = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def stop() -> bool:
        # Said here and not in the handler, which may have interrupted another line.
        nonlocal said
        if asked and not said:
            said = True
            report("stopping: what is recorded is safe; press Ctrl-C again to stop at once")
        return asked

    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

"""Workers whose trials keep failing while others succeed.

A failure that a worker reports (an error, a metric that is no number, no memory) is the candidate's, and is told
as it is. But when `FAILURES_IN_A_ROW` different candidates fail on one worker, without a success between them
and while other workers had one, the last of these is given to another worker before it is told, and the
first worker gets no job meanwhile. Where the candidate succeeds there, the worker is replaced; where it fails
again, the worker goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.jobs import Entry
    from cluster.slot import Slot

FAILURES_IN_A_ROW = 4


class Doubts:
    """Counts failures in a row, and knows which workers wait for a second opinion on which job."""

    def __init__(self) -> None:
        self._successes = 0
        self._waiting: dict[Entry, Slot] = {}

    def __len__(self) -> int:
        """How many workers are doubted."""
        return sum(slot.phase == "doubted" for slot in self._waiting.values())

    def succeeded(self, slot: Slot) -> None:
        """A job succeeded on this worker."""
        slot.failed.clear()
        self._successes += 1

    def failed(self, slot: Slot, candidate: int) -> bool:
        """A candidate failed on this worker; returns whether another one shall try it."""
        if not slot.failed:
            slot.successes = self._successes
        slot.failed.add(candidate)
        return len(slot.failed) >= FAILURES_IN_A_ROW and self._successes > slot.successes

    def wait(self, slot: Slot, entry: Entry) -> None:
        """The worker waits for what becomes of the job elsewhere."""
        slot.phase = "doubted"
        self._waiting[entry] = slot

    def settle(self, entry: Entry) -> Slot | None:
        """The worker that waited for this job, if it is still there; it waits no longer."""
        slot = self._waiting.pop(entry, None)
        return slot if slot is not None and slot.phase == "doubted" else None

    def asker(self, entry: Entry) -> Slot | None:
        """The worker that waits for this job and must not get it again."""
        return self._waiting.get(entry)

    def entries(self) -> list[Entry]:
        """The jobs that workers wait for."""
        return list(self._waiting)

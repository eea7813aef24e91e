"""Calls to workers that are on their way, and those that came back.

What happens at every step must not cost more with more workers. So Ray tells which call is done, instead of
being asked about all of them each time, and time limits wait in a heap.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.slot import Slot

FOREVER = float("inf")
SWEEP_SECONDS = 10.0
"""So often Ray is asked about all calls after all, should it ever have kept one to itself."""
FETCH_SECONDS = 0.05
"""Longest wait for a large answer that still travels, before other answers get their turn."""


class Calls:
    """The calls in flight, at most one per worker; `Slot.call` is its number."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Slot, Any]] = {}
        self._numbers = itertools.count()
        self._done: SimpleQueue[int] = SimpleQueue()
        self._travelling: set[int] = set()
        self._limits: list[tuple[float, int]] = []
        self._next_sweep = time.monotonic() + SWEEP_SECONDS

    def send(self, slot: Slot, ref: Any, deadline: float = FOREVER) -> None:
        """Wait for Ray's `ref` on behalf of `slot` from now on; see `overdue` for `deadline` (monotonic seconds)."""
        number = next(self._numbers)
        self._open[number] = slot, ref
        slot.call = number
        if deadline < FOREVER:
            heapq.heappush(self._limits, (deadline, number))
            if len(self._limits) > 64 + 2 * len(self._open):  # mostly limits of calls that came back in time
                self._limits = [limit for limit in self._limits if limit[1] in self._open]
                heapq.heapify(self._limits)
        _when_done(ref, lambda _: self._done.put(number))

    def drop(self, slot: Slot) -> None:
        """Forget the call of a worker, if it has one."""
        if slot.call is not None:
            self._open.pop(slot.call, None)
            self._travelling.discard(slot.call)
            slot.call = None

    def returned(self, seconds: float) -> list[tuple[Slot, Any]]:
        """Calls that came back, each with the reference that `ray.get` now answers at once.

        Waits up to `seconds` for the first. A call is returned once.
        """
        import ray

        noticed = self._notices(min(seconds, FETCH_SECONDS) if self._travelling else seconds)
        asked = noticed | self._travelling
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
            asked.update(self._open)
        numbers = {self._open[number][1]: number for number in asked if number in self._open}
        if not numbers:
            return []
        here, elsewhere = ray.wait(list(numbers), num_returns=len(numbers), timeout=0)
        # A large answer stays on the worker's node until somebody asks; asking has set it on its way.
        self._travelling |= noticed & {numbers[ref] for ref in elsewhere}
        found = []
        for ref in here:
            slot, _ = self._open[numbers[ref]]
            self.drop(slot)
            found.append((slot, ref))
        return found

    def overdue(self, now: float) -> list[Slot]:
        """Workers whose call has passed its deadline."""
        found = []
        while self._limits and self._limits[0][0] < now:
            _, number = heapq.heappop(self._limits)
            if number in self._open:
                found.append(self._open[number][0])
        return found

    def _notices(self, seconds: float) -> set[int]:
        """Numbers of calls that Ray calls done, after waiting up to `seconds` for the first."""
        noticed: set[int] = set()
        try:
            noticed.add(self._done.get(timeout=seconds) if seconds > 0 else self._done.get_nowait())
            while True:
                noticed.add(self._done.get_nowait())
        except Empty:
            return noticed


def _when_done(ref: Any, tell: Callable[[object], None]) -> None:
    """Have `tell` called from one of Ray's threads when the answer exists, be it an error."""
    ready = getattr(ref, "_on_ready", None)  # does not fetch the answer; not in older Rays
    (ready or ref._on_completed)(tell)

"""What is in flight: jobs whose results are not recorded yet, and the results that are there already."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from evaluators.base import ItemPool
from search.pool import Outcome

Key = tuple[int, ItemPool]


class InFlight:
    """Says which result is recorded next. Every call takes constant time, whatever the window.

    Args:
        ordered: whether results are recorded in the order in which their jobs were opened, or as they arrive.
        kept: results from before, whose jobs are still to be opened.
    """

    def __init__(self, ordered: bool, kept: Mapping[Key, Outcome]) -> None:
        self._ordered = ordered
        self._open: set[Key] = set()
        self._arrived: dict[Key, Outcome] = dict(kept)
        # Ordered: all that are open. By arrival: those that may be recorded. A dict would not do: its first
        # key is found by walking over the places of all that were deleted before it.
        self._order: deque[Key] = deque()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def open(self, key: Key) -> None:
        """A job is on its way, unless its result is there."""
        if key in self._open:
            return
        self._open.add(key)
        if self._ordered or key in self._arrived:
            self._order.append(key)

    def result(self, key: Key) -> Outcome | None:
        """The result of a job, if it is there and not taken yet."""
        return self._arrived.get(key)

    def arrive(self, outcome: Outcome) -> bool:
        """A result came; False if nobody waits for it (any more)."""
        key = outcome.key
        if key not in self._open or key in self._arrived:
            return False
        self._arrived[key] = outcome
        if not self._ordered:
            self._order.append(key)
        return True

    @property
    def ready(self) -> bool:
        """Whether a result can be recorded now."""
        return bool(self._order) and self._order[0] in self._arrived

    def take(self) -> Outcome | None:
        """The result to be recorded next, which is no longer in flight; None when it is not there."""
        if not self.ready:
            return None
        key = self._order.popleft()
        self._open.remove(key)
        return self._arrived.pop(key)

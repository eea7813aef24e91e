"""Workers that were lost before they could take a job.

Several in a row mean that workers cannot start here at all, and the run says so instead of trying for ever. While
others are at work, they mean it only of one node: several nodes that join with the same fault are set aside one by one.
And workers also go with their node, and several nodes may go while the pool starts: that says nothing about workers.
Ray tells of a worker's death long before it tells of the node's, so a death counts when the node outlived it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from search.errors import MeiosisError


@dataclass(frozen=True)
class StartDeath:
    """A loss: where, why, with which traceback, when it counts (monotonic seconds), and the error for the user if there
    is one that says it all."""

    node: str
    why: str
    detail: str
    due: float
    explained: MeiosisError | None = None


class StartDeaths:
    """The losses since a worker came up the last time."""

    def __init__(self) -> None:
        self._deaths: list[StartDeath] = []

    def add(self, death: StartDeath) -> None:
        """Note a loss."""
        self._deaths.append(death)

    def clear(self) -> None:
        """A worker came up, or it is known that something else is to blame."""
        self._deaths.clear()

    def counted(self, dead: Collection[str], now: float, *, others_work: bool) -> list[StartDeath]:
        """The losses that count by now; those on nodes that are `dead` (Ray's ids) never will.

        Args:
            others_work: whether there are workers that can take jobs; then only those of the worst node count.
        """
        self._deaths = [death for death in self._deaths if death.node not in dead]
        due = [death for death in self._deaths if death.due <= now]
        if not others_work or not due:
            return due
        ((worst, _),) = Counter(death.node for death in due).most_common(1)
        return [death for death in due if death.node == worst]

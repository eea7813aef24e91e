"""Room that something else than our runs has: a cluster may hold less than its nodes say.

Ray tells what a node has in all, and that some of it is taken, but not by whom, and a worker that is just being started
would look like a stranger. So the runs go by what they see of each other: where one has had less than its share for
long, though none has more, there is no more than what they hold together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

from cluster.shares import Claim

SCARCE_SECONDS = 60.0
"""So long a run must have had less than its share, with none above theirs."""
HELD_SECONDS = 30.0
"""What the runs hold is the most of so many seconds: less while a worker goes from one to the other."""


class Scarcity:
    """Watches what the runs hold of what was planned for them."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._held: deque[tuple[float, float, float]] = deque()

    def look(
        self, now: float, claims: Sequence[Claim], has: Mapping[str, int], planned: Mapping[str, int]
    ) -> dict[str, dict[str, float]] | None:
        """What there is to share, as one node, or None as long as the nodes seem to be all ours.

        Args:
            now: monotonic seconds.
            claims: of all runs.
            has, planned: id of a claim -> workers.
        """
        cpus = sum(has[claim.id] * claim.need.cpus for claim in claims)
        gpus = sum(has[claim.id] * claim.need.gpus for claim in claims)
        self._held.append((now, cpus, gpus))
        while self._held[0][0] < now - HELD_SECONDS:
            self._held.popleft()
        less = any(has[claim.id] < planned[claim.id] for claim in claims)
        if not less or any(has[claim.id] > planned[claim.id] for claim in claims):
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        if now - self._since < SCARCE_SECONDS:
            return None
        most_gpus = max(gpus for _, _, gpus in self._held)
        return {"": {"CPU": max(cpus for _, cpus, _ in self._held), "GPU": float(math.ceil(most_gpus - 1e-6))}}

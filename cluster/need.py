"""What one worker takes of its node, and what a node has left for more of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NEARLY = 1e-6
"""Half of 1 GPU, thrice a third: a little more than there is must still count as there."""


@dataclass(frozen=True)
class Need:
    """What is reserved for a worker.

    Attributes:
        cpus: cores; 0 where workers share those that there are.
        gpus: a fraction of one GPU, or a whole number of GPUs.
    """

    cpus: float = 0.0
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"

    def fits(self, resources: Mapping[str, float], most: int) -> int:
        """How many workers, at most `most`, an empty node with these resources (`CPU`, `GPU`) holds."""
        found = most
        if self.cpus > 0:
            found = min(found, int(resources.get("CPU", 0.0) / self.cpus + NEARLY))
        gpus = resources.get("GPU", 0.0)
        if self.gpus >= 1:
            found = min(found, int(gpus / self.gpus + NEARLY))
        elif self.gpus > 0:  # a fraction lies on one GPU: 2 GPUs hold two workers with 0.6 each, not three
            found = min(found, int(gpus) * int(1 / self.gpus + NEARLY))
        return found


class Room:
    """What is free on a node while workers are placed on it, GPU by GPU."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self.cpus = resources.get("CPU", 0.0)
        self.gpus = [1.0] * int(resources.get("GPU", 0.0))

    def holds(self, need: Need) -> bool:
        """Whether one more worker fits."""
        if self.cpus + NEARLY < need.cpus:
            return False
        if need.gpus >= 1:
            return sum(free >= 1 - NEARLY for free in self.gpus) >= need.gpus
        return need.gpus == 0 or max(self.gpus, default=0.0) + NEARLY >= need.gpus

    def take(self, need: Need) -> None:
        """Place a worker that fits, a fraction of a GPU on the fullest GPU that has it."""
        self.cpus -= need.cpus
        if need.gpus >= 1:
            whole = [index for index, free in enumerate(self.gpus) if free >= 1 - NEARLY]
            for index in whole[: int(need.gpus)]:
                self.gpus[index] = 0.0
        elif need.gpus > 0:
            left, index = min((free, i) for i, free in enumerate(self.gpus) if free + NEARLY >= need.gpus)
            self.gpus[index] = left - need.gpus

    @property
    def free(self) -> tuple[float, float]:
        """GPUs and cores that are left."""
        return sum(self.gpus), self.cpus

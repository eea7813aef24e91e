"""A worker as its pool sees it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.jobs import Entry
from search.prefix.affinity import Recent

Phase = Literal["starting", "building", "idle", "checking", "working", "doubted", "gone"]


@dataclass(eq=False)
class Slot:
    """A worker.

    Attributes:
        call: number of the one call in flight, see `Calls`.
        group: Ray's placement group that holds its GPUs, where it has several.
        avoid: Ray's ids of nodes on which it must not be placed.
        phase: `checking` lies between idle and working: a job waits until the worker answers, so that one that
            died while it was idle does not count against the job. `doubted`: see `cluster.doubts`.
        seen: when it returned its last outcome, in monotonic seconds.
        node: Ray's id of its node.
        host: name of that machine.
        greeted_at: when its `Greeting` came, in Unix seconds.
        hello_seconds: what that call took inside its process.
        late: whether the first job had been started when it greeted.
        failed: candidates that failed on it since the last success.
        successes: how many outcomes of all workers were successes when the first of these failed.
        recent: what the candidates that it had are made of.
    """

    number: int
    name: str
    actor: Any
    group: Any = None
    avoid: frozenset[str] = frozenset()
    call: int | None = None
    phase: Phase = "starting"
    seen: float = -math.inf
    node: str = ""
    host: str = ""
    greeted_at: float = 0.0
    hello_seconds: float = 0.0
    late: bool = False
    entry: Entry | None = None
    failed: set[int] = field(default_factory=set)
    successes: int = 0
    recent: Recent = field(default_factory=Recent)

    @property
    def up(self) -> bool:
        """Whether it can take jobs, or has one."""
        return self.phase in ("idle", "checking", "working", "doubted")

    def kill(self) -> None:
        """End the worker's process, whatever it does, and give back what was reserved for it."""
        import ray

        self.phase = "gone"
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # gone already
            ray.kill(self.actor, no_restart=True)
        if self.group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self.group)
            self.group = None

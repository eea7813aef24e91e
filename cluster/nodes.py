"""The nodes of the cluster: which of them may get workers and jobs.

A node gets neither while it is *draining*, that is, Ray was told that it is about to go (`ray drain-node`,
an autoscaler that scales down, a preemption notice), or while it is *set aside*: after `DEATHS` workers of it
died, could not start or were replaced for their failures within `WINDOW_SECONDS`, for `ASIDE_SECONDS`. A death
under a job is blamed on the node only if the job then came back from another one: a candidate that kills workers
everywhere is to blame itself. A node is not set aside when no other could hold a worker, and all come back
when there has been no worker for `NOBODY_SECONDS`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.need import Need
from cluster.sharing import Shared
from search.store.nodes_file import NODES, NodeState, WorkersState, write_nodes

if TYPE_CHECKING:
    from cluster.slot import Slot

DEATHS = 3
WINDOW_SECONDS = 600.0
ASIDE_SECONDS = 600.0
NOBODY_SECONDS = 60.0


@dataclass(eq=False)
class Node:
    """One node. Times are monotonic seconds, `leaves_at` is in seconds of the clock, 0 where it is not known."""

    id: str
    host: str
    resources: Mapping[str, float]
    alive: bool = True
    draining: bool = False
    leaves_at: float = 0.0
    aside_until: float = 0.0
    why: str = ""
    deaths: int = 0
    blamed: deque[float] = field(default_factory=deque)
    workers: dict[int, Slot] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether it may get workers and jobs."""
        return self.alive and not self.draining and not self.aside_until

    def __str__(self) -> str:
        return f"node {self.host} ({self.id[:8]})"


class NodeBook:
    """What is known of every node.

    Args:
        need: what a worker takes of its node.
        wanted: the most workers there shall be.
        report: called with one line when a node joins, goes, drains, is set aside or taken back.
    """

    def __init__(self, need: Need, wanted: int, report: Callable[[str], None]) -> None:
        self._need, self._wanted, self._report = need, wanted, report
        self._nodes: dict[str, Node] = {}
        self._shared = Shared()
        self._up_at = time.monotonic()
        self._changed = True
        self.avoided: frozenset[str] = frozenset()
        """Ray's ids of nodes that are alive and may get neither workers nor jobs."""
        self.dead: frozenset[str] = frozenset()
        """Ray's ids of nodes that were there once."""
        self._look(first=True)

    @property
    def several(self) -> bool:
        """Whether a node can die and leave work behind."""
        return len(self._nodes) > 1

    @property
    def room(self) -> int:
        """How many workers the nodes that may get some hold while nothing else runs on them."""
        return sum(self._fits(node) for node in self._nodes.values() if node.usable)

    @property
    def capacity(self) -> dict[str, dict[str, float]]:
        """Node -> `CPU` and `GPU` of those that any run may use."""
        return {
            node.id: {what: node.resources.get(what, 0.0) for what in ("CPU", "GPU")}
            for node in self._nodes.values()
            if node.alive and not node.draining
        }

    @property
    def held(self) -> dict[str, int]:
        """Node -> workers of this pool there, without those that did not say yet where they are."""
        return {node.id: len(node.workers) for node in self._nodes.values() if node.workers}

    def refresh(self, now: float) -> None:
        """See which nodes are there, and take back those whose time is over."""
        self._look()
        if any(node.workers for node in self._nodes.values()):
            self._up_at = now
        nobody = now - self._up_at > NOBODY_SECONDS
        for node in self._nodes.values():
            if node.aside_until and (nobody or node.aside_until <= now or not self._usable_elsewhere(node)):
                node.aside_until, node.why = 0.0, ""
                node.blamed.clear()
                if node.alive:
                    self._report(
                        f"{node} is taken back: {'there are no other workers' if nobody else 'its time is over'}"
                    )
        self._note_avoided()

    def arrived(self, slot: Slot) -> None:
        """A worker said on which node it is."""
        if slot.node not in self._nodes:
            self._look()  # it joined a moment ago
        node = self._nodes.setdefault(slot.node, Node(slot.node, "?", {}))
        node.workers[slot.number] = slot
        self._changed = True

    def left(self, slot: Slot, *, died: bool) -> None:
        """A worker is gone."""
        if (node := self._nodes.get(slot.node)) is not None:
            node.workers.pop(slot.number, None)
            node.deaths += died
            self._changed = True

    def blame(self, node_id: str, why: str, now: float) -> bool:
        """A worker was lost, and its node may be the reason; returns whether it was set aside for that."""
        node = self._nodes.get(node_id)
        if node is None or not node.usable:
            return False
        node.blamed.append(now)
        while node.blamed[0] < now - WINDOW_SECONDS:
            node.blamed.popleft()
        if len(node.blamed) < DEATHS or not self._usable_elsewhere(node):
            return False
        node.aside_until = now + ASIDE_SECONDS
        node.why = f"{len(node.blamed)} workers died or failed there, the last one: {why}"
        self._report(f"{node} is set aside for {ASIDE_SECONDS:g} s: {node.why}")
        self._note_avoided()
        return True

    def others(self, nodes: Collection[str]) -> bool:
        """Whether a usable node that is not one of these has workers that get jobs."""
        return any(
            node.usable
            and node.id not in nodes
            and any(slot.up and slot.phase != "doubted" for slot in node.workers.values())
            for node in self._nodes.values()
        )

    def write(self, folder: Path, shared: Shared) -> None:
        """Write what there is to show into the folder of the pool, if it changed.

        Nodes that are gone stay in it if workers died there. A folder that cannot be written ends nothing: the
        history, which must be, says so itself.
        """
        if not self._changed and shared == self._shared:
            return
        self._changed, self._shared = False, shared
        up = sum(slot.up for node in self._nodes.values() for slot in node.workers.values())
        shown = tuple(_state(node) for node in self._nodes.values() if node.alive or node.deaths)
        try:
            state = WorkersState(_clock(time.time()), self._wanted, up, shown, shared.share, shared.others)
            write_nodes(folder, state)
        except OSError as error:
            self._report(f"{folder / NODES} cannot be written: {error.strerror}")

    def now_up(self) -> None:
        """A worker can take jobs from now on."""
        self._changed = True

    def name(self, node_id: str) -> str:
        """How a node is called in lines for people."""
        return str(self._nodes.get(node_id, "its node"))

    def _usable_elsewhere(self, than: Node) -> bool:
        return any(node.usable and node is not than and self._fits(node) for node in self._nodes.values())

    def _fits(self, node: Node) -> int:
        return self._need.fits(node.resources, self._wanted)

    def _note_avoided(self) -> None:
        avoided = frozenset(node.id for node in self._nodes.values() if node.alive and not node.usable)
        self._changed |= avoided != self.avoided
        self.avoided = avoided

    def _look(self, first: bool = False) -> None:
        import ray

        draining = draining_nodes()
        for seen in ray.nodes():
            node = self._nodes.get(seen["NodeID"])
            if node is None:
                if not seen["Alive"]:
                    continue
                node = Node(seen["NodeID"], seen["NodeManagerHostname"], seen["Resources"])
                self._nodes[node.id] = node
                self._changed = True
                if not first:
                    self._report(f"{node} joined the cluster")
            node.resources = seen["Resources"] or node.resources
            if node.alive and not seen["Alive"]:
                node.alive, node.draining, self._changed = False, False, True
                self._report(f"{node} left the cluster")
            if node.alive and node.id in draining and not node.draining:
                node.draining, node.leaves_at = True, draining[node.id]
                when = f" at {_clock(node.leaves_at)}" if node.leaves_at else ""
                self._report(f"{node} is about to go{when}: it gets no more jobs, and its workers move elsewhere")
            elif node.draining and node.id not in draining:
                node.draining = False
        self.dead = frozenset(node.id for node in self._nodes.values() if not node.alive)
        self._note_avoided()


def draining_nodes() -> dict[str, float]:
    """Nodes that Ray was told to empty, with the time at which they go, in seconds of the clock; 0: not said."""
    import ray

    # Ray's own libraries ask here as well; its public state API needs the dashboard and does not tell.
    state = ray._private.state.state
    found: Mapping[str, int] = state.get_draining_nodes() if hasattr(state, "get_draining_nodes") else {}
    return {node: milliseconds / 1000 for node, milliseconds in found.items()}


def is_placed(actor: object) -> bool:
    """Whether an actor has got its room on a node; it may still be busy there with its first call."""
    import ray

    try:
        return str(ray._private.state.actors(actor._actor_id.hex())["State"]) == "ALIVE"  # type: ignore[attr-defined]
    except (KeyError, AttributeError, ray.exceptions.RayError):
        return False


def node_of(actor: object) -> str:
    """Ray's id of the node where an actor is or was, empty where it never got one; for workers that never spoke."""
    import ray

    try:
        return str(ray._private.state.actors(actor._actor_id.hex())["Address"]["NodeID"])  # type: ignore[attr-defined]
    except (KeyError, AttributeError, ray.exceptions.RayError):
        return ""


def _state(node: Node) -> NodeState:
    state, why, until = "in use", node.why, ""
    if not node.alive:
        state, why = "gone", ""
    elif node.draining:
        state, why = "draining", "it is about to go"
        until = _clock(node.leaves_at) if node.leaves_at else ""
    elif node.aside_until:
        state, until = "set aside", _clock(time.time() + node.aside_until - time.monotonic())
    workers = tuple(slot.name for slot in node.workers.values())
    return NodeState(node.host, node.id[:8], state, workers, node.deaths, why, until)


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")

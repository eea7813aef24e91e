"""How many workers this pool may have beside those of other runs on the cluster, and which of them must go.

About once a second the pool tells the others what it wants (`cluster.register`) and works out, as each of them does,
who gets how much (`cluster.shares`). While a run has less than its share, the others hire none above theirs, and those
that have more let workers go, each when its trial ends: none is killed. A run wants no more workers than it had
jobs for a moment ago, so what one does not use is the others'. Where runs need nodes of different shape, it also counts
where the workers are: those go first that lie where another run's were planned, and if that run still finds no room,
they move, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from cluster.need import Need
from cluster.register import PoolEntry, Register, owner
from cluster.scarcity import Scarcity
from cluster.shares import Claim, Placement, share_out

DEMAND_SECONDS = 15.0
"""So long a run may have fewer jobs than workers, before it is said to want fewer."""
CALM_SECONDS = 10.0
"""When all runs have had their shares for so long, one may ask for more workers than there is room for: an autoscaler
adds nodes only for workers that wait."""
MOVE_SECONDS = 15.0
"""When a run has had less than its share for so long, workers of others move out of its way."""
MOVE_EVERY = 5.0
TELL_SECONDS = 2.0
"""A change is told when it has lasted so long: shares settle within a few looks."""


@dataclass(frozen=True)
class Shared:
    """How the cluster is shared now.

    Attributes:
        share: workers that this run may have; None where no other run is there.
        others: the other runs, as `run of user@host`.
    """

    share: int | None = None
    others: tuple[str, ...] = ()

    def line(self, wanted: int) -> str:
        """It in words."""
        runs = "1 other run" if len(self.others) == 1 else f"{len(self.others)} other runs"
        if self.share is None:
            return "has the cluster to itself again"
        if self.share == 0:
            have = "has" if len(self.others) == 1 else "share"
            return f"waits: {runs} {have} all room on the cluster; it goes on when one ends or a node joins"
        return f"shares the cluster with {runs}: {self.share} of {wanted} workers"


class Sharing:
    """The part of one pool in sharing a cluster.

    Args:
        register: where the other pools are met; None: the cluster is our own, and nobody else's.
        need: of one worker.
        workers: the most there shall be.
        run: name of the run.
        report: called with one line when the share changes.
    """

    def __init__(
        self, register: Register | None, need: Need, workers: int, run: str, report: Callable[[str], None]
    ) -> None:
        self._register, self._need, self._workers, self._run, self._report = register, need, workers, run, report
        self._owner = owner() if register is not None else ""
        self.allowed = workers
        """How many workers the pool may have now, those included that wait for room."""
        self.full: frozenset[str] = frozenset()
        """Nodes on which no more workers should be placed, since others need the room."""
        self.now = Shared()
        self.below = False
        """Whether fewer workers than the share have said where they are, beside other runs."""
        self._told, self._changed_at = Shared(), -TELL_SECONDS
        self._jobs_most, self._jobs_most_at = -1, 0.0
        self._facts: tuple[Mapping[str, Mapping[str, float]], tuple[Claim, ...]] | None = None
        self._plan: Mapping[str, Placement] = {}
        self._scarcity = Scarcity()
        self._surplus: dict[str, int] = {}
        self._where_matters = self._may_move = False
        self._short_since: float | None = None
        self._short_at = self._moved_at = -CALM_SECONDS

    def look(
        self,
        now: float,
        jobs: int,
        nodes: Mapping[str, Mapping[str, float]],
        avoided: Collection[str],
        held: Mapping[str, int],
        coming: int = 0,
    ) -> None:
        """Meet the others, and see what follows.

        Args:
            now: monotonic seconds.
            jobs: how many have no outcome yet.
            nodes: node -> resources, of all nodes that may get workers of any run.
            avoided: nodes on which this pool places none.
            held: node -> workers that this pool has there.
            coming: workers that have a place and did not say yet where; only asked for while `below`.
        """
        if self._register is None:
            return
        has = sum(held.values()) + coming
        ours = Claim(self._register.id, self._need, self._demand(now, jobs), frozenset(avoided))
        entry = PoolEntry(
            ours.id,
            self._run,
            self._owner,
            self._register.job,
            self._need,
            wanted=self._workers,
            demand=ours.wanted,
            has=has,
            avoids=tuple(sorted(avoided)),
        )
        others = self._register.exchange(entry, now)
        if others is None:  # nobody can be told anything now, so nothing changes
            return
        if others:
            self._share(now, ours, others, nodes, held, has)
        else:
            self.allowed, self.full, self.now = self._workers, frozenset(), Shared()
            self._surplus, self._short_since, self._may_move = {}, None, False
            self._scarcity = Scarcity()
        self.below = bool(others) and has - coming < self.fair
        self._tell(now)

    @property
    def fair(self) -> int:
        """How many workers this pool can count on: all that it wants, or its share."""
        return self._workers if self.now.share is None else self.now.share

    def must_go(self, node: str, workers: int) -> bool:
        """Whether a worker on that node, which has no trial, should end, of so many that there are."""
        there_matters = self._surplus.get(node, 0) > 0
        if workers > self.allowed:
            return there_matters or not self._where_matters
        return self._may_move and there_matters

    def went(self, node: str, now: float) -> None:
        """A worker ended there for the sake of others."""
        self._surplus[node] = self._surplus.get(node, 0) - 1
        self._may_move, self._moved_at = False, now

    def close(self) -> None:
        """Leave the room to the others."""
        if self._register is not None:
            self._register.leave()

    def _demand(self, now: float, jobs: int) -> int:
        """How many workers there is work for: at least one, and the most of the last seconds; all before it begins."""
        if jobs == 0 and self._jobs_most < 0:
            return self._workers
        if jobs >= self._jobs_most or now - self._jobs_most_at > DEMAND_SECONDS:
            self._jobs_most, self._jobs_most_at = jobs, now
        return max(1, min(self._workers, self._jobs_most))

    def _share(
        self,
        now: float,
        ours: Claim,
        others: tuple[PoolEntry, ...],
        nodes: Mapping[str, Mapping[str, float]],
        held: Mapping[str, int],
        has: int,
    ) -> None:
        claims = (ours, *(Claim(o.id, o.need, o.demand, frozenset(o.avoids)) for o in others))
        if (nodes, claims) != self._facts:
            self._facts = dict(nodes), claims
            self._plan = share_out(nodes, claims)
        plan = self._plan
        scarce = self._scarcity.look(
            now,
            claims,
            {ours.id: has, **{o.id: o.has for o in others}},
            {id: sum(p.values()) for id, p in plan.items()},
        )
        if scarce is not None:
            plan = share_out(scarce, [replace(claim, avoids=frozenset()) for claim in claims])
        mine = plan[ours.id]
        share = sum(mine.values())
        others_short = any(other.has < sum(plan[other.id].values()) for other in others)
        if others_short:
            self._short_since = now if self._short_since is None else self._short_since
            self.allowed = share
        else:
            self._short_since = None
            calm = has >= share and now - self._short_at >= CALM_SECONDS
            self.allowed = self._workers if calm else max(share, min(has, self.allowed))
        if others_short or has < share:
            self._short_at = now
        self._where_matters = scarce is None and any(c.need != ours.need or c.avoids for c in claims)
        self._surplus = {node: count - mine.get(node, 0) for node, count in held.items()}
        patient = self._short_since is None or now - self._short_since < MOVE_SECONDS
        crowded = self._where_matters and not patient
        self.full = frozenset(n for n in nodes if held.get(n, 0) >= mine.get(n, 0)) if crowded else frozenset()
        self._may_move = crowded and has == share == sum(held.values()) and now - self._moved_at >= MOVE_EVERY
        self.now = Shared(share, tuple(str(other) for other in others))

    def _tell(self, now: float) -> None:
        if self.now == self._told:
            self._changed_at = now
        elif now - self._changed_at >= TELL_SECONDS:
            self._told, self._changed_at = self.now, now
            self._report(self.now.line(self._workers))


def open_sharing(need: Need, workers: int, run: str, report: Callable[[str], None], *, alone: bool) -> Sharing:
    """The part of a new pool; `alone`: on a Ray of its own, where there are no others."""
    return Sharing(None if alone else Register(), need, workers, run, report)

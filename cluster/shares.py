"""How the runs on a cluster share it: fair by dominant resource.

The dominant share of a run is the largest part of any one resource of the whole cluster that its workers hold. Workers
are given out one by one, each to the run with the smallest dominant share of those that want one more and for which a
node still has room (Ghodsi 2011, "Dominant Resource Fairness", algorithm 1, https://www.usenix.org/conference/nsdi11).
So shares are max-min fair; runs of equal needs differ by one worker at most. All drivers compute the same from the
same facts, and nobody has to decide for the others.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.need import Need, Room

Placement = Mapping[str, int]
"""Node -> workers there."""


@dataclass(frozen=True)
class Claim:
    """What a run asks for.

    Attributes:
        id: of its pool; of equal claims the one that sorts first comes first.
        need: of one worker.
        wanted: the most workers it can use now.
        avoids: nodes on which it places none.
    """

    id: str
    need: Need
    wanted: int
    avoids: frozenset[str] = frozenset()


def share_out(nodes: Mapping[str, Mapping[str, float]], claims: Iterable[Claim]) -> dict[str, Placement]:
    """How many workers each run may have, and where they would fit together.

    Args:
        nodes: node -> resources that it has while nothing runs on it, `CPU` and `GPU`.
        claims: of all runs, in any order; each id once.

    Returns:
        A placement for every claim, by its id. Workers are packed, a run's on one node as long as it has room,
        then on the fullest that has, so that nodes stay free for large ones.
    """
    rooms = {node: Room(resources) for node, resources in sorted(nodes.items())}
    cpus = sum(resources.get("CPU", 0.0) for resources in nodes.values())
    gpus = sum(resources.get("GPU", 0.0) for resources in nodes.values())
    given: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    last: dict[str, str] = {}
    line: list[tuple[float, str, Claim]] = []
    for claim in sorted(claims, key=lambda claim: claim.id):
        given[claim.id] = Counter()
        heapq.heappush(line, (0.0, claim.id, claim))
    while line:
        _, _, claim = heapq.heappop(line)
        if counts[claim.id] >= claim.wanted:
            continue
        node = last.get(claim.id, "")
        if node not in rooms or not rooms[node].holds(claim.need):
            fitting = [n for n, room in rooms.items() if n not in claim.avoids and room.holds(claim.need)]
            if not fitting:
                continue
            node = last[claim.id] = min(fitting, key=lambda node: (rooms[node].free, node))
        rooms[node].take(claim.need)
        given[claim.id][node] += 1
        counts[claim.id] += 1
        heapq.heappush(line, (dominant_share(claim.need, counts[claim.id], cpus, gpus), claim.id, claim))
    return dict(given)


def dominant_share(need: Need, workers: int, cpus: float, gpus: float) -> float:
    """The largest part, 0 to 1, that so many workers hold of all cores or of all GPUs of a cluster."""
    of_cpus = workers * need.cpus / cpus if cpus > 0 else 0.0
    return max(of_cpus, workers * need.gpus / gpus if gpus > 0 else 0.0)

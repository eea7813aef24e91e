"""Which points are better than which, when there are several losses (Deb et al. 2002, NSGA-II,
https://doi.org/10.1109/4235.996017).

Losses are arrays (n_points, n_terms), smaller is better. Violations are (n_points,), 0 for points that keep the
constraints; with them dominance is Deb's constrained one: a feasible point dominates every infeasible one, of two
infeasible ones that with the smaller violation does, and among feasible ones the losses decide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
Violations = NDArray[np.float64]


def dominance(losses: Losses, violations: Violations | None = None) -> NDArray[np.bool_]:
    """(n_points, n_points): whether the point of the row dominates that of the column."""
    # Term by term: one (n, n) array at a time instead of one (n, n, terms).
    no_worse = np.ones((len(losses), len(losses)), dtype=bool)
    better = np.zeros_like(no_worse)
    for term in losses.T:
        no_worse &= term[:, None] <= term[None, :]
        better |= term[:, None] < term[None, :]
    dominates = no_worse & better
    if violations is None or not violations.any():
        return dominates
    feasible = violations <= 0
    return np.where(feasible[:, None] & feasible[None, :], dominates, violations[:, None] < violations[None, :])


def ranks(losses: Losses, violations: Violations | None = None) -> NDArray[np.int64]:
    """(n_points,): the front every point belongs to; 0 is the front that nothing dominates."""
    dominates = dominance(losses, violations)
    dominators = dominates.sum(axis=0)
    found = np.full(len(losses), -1, dtype=np.int64)
    rank = 0
    while (front := (found < 0) & (dominators == 0)).any():
        found[front] = rank
        dominators = dominators - dominates[front].sum(axis=0)
        rank += 1
    return found


def front(losses: Losses) -> list[int]:
    """Indices of the points that nothing dominates, by their first loss; of equal points the first. Unlike `ranks` it
    takes little memory for many points."""
    found: list[int] = []
    kept = np.empty((0, losses.shape[1]))
    # In this order nothing is dominated by what comes later.
    for index in np.lexsort(losses.T[::-1]).tolist():
        if not (kept <= losses[index]).all(axis=1).any():
            found.append(index)
            kept = losses[found]
    return found


def crowding(losses: Losses) -> NDArray[np.float64]:
    """(n_points,): how far the neighbours of a point of one front are apart, summed over the terms, each relative to
    its range on the front; infinite for the best and the worst point of a term (crowding distance, section III-B)."""
    count = len(losses)
    distance = np.zeros(count)
    for term in losses.T:
        order = np.argsort(term, kind="stable")
        width = term[order[-1]] - term[order[0]] if count else 0.0
        if width <= 0:
            continue
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (term[order[2:]] - term[order[:-2]]) / width
    return distance


def crowding_by_rank(losses: Losses, rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n_points,): the crowding distance of every point within its front."""
    distance = np.zeros(len(losses))
    for front in range(int(rank.max(initial=-1)) + 1):
        members = np.flatnonzero(rank == front)
        distance[members] = crowding(losses[members])
    return distance


def spread(losses: Losses, count: int) -> list[int]:
    """Indices of at most `count` points of one front, in their order: the least crowded. They are found by taking
    away the most crowded point again and again, since its neighbours are less crowded without it (Kukkonen & Deb 2006,
    "Improved pruning of non-dominated solutions based on crowding distance for bi-objective optimization problems",
    https://doi.org/10.1109/CEC.2006.1688443: a clear gain with two losses; with three they found none, since crowding
    distance then says little of how crowded a point is); of equally crowded points the later one goes."""
    kept = list(range(len(losses)))
    while len(kept) > max(count, 0):
        distance = crowding(losses[kept])
        least = len(kept) - 1 - int(np.argmin(distance[::-1]))
        del kept[least]
    return kept

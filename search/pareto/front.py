"""The front of a run: the trials that nothing else beats in every term, and the volume they dominate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from evaluators.base import ItemPool
from search.candidate import PARENT
from search.objective import Objective
from search.pareto.dominance import Losses, front
from search.pareto.hypervolume import hypervolume, reference_point
from search.store.events import Trial


@dataclass(frozen=True)
class FrontPoint:
    """A feasible trial.

    Attributes:
        candidate, origin: which one.
        losses: the normalised loss of every term, smaller is better.
        metrics: all that was measured of it.
    """

    candidate: int
    origin: str
    losses: tuple[float, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """The points of a front, by their first loss.

    Attributes:
        items: the pool of items they were scored on.
        metrics: the terms, in the order of the losses.
        reference: the corner up to which volume counts; None where no parent was scored.
    """

    items: ItemPool
    metrics: tuple[str, ...]
    points: tuple[FrontPoint, ...]
    reference: tuple[float, ...] | None = None

    def losses(self) -> Losses:
        """(n_points, n_terms)."""
        return losses_of(self.points, len(self.metrics))

    def hypervolume(self) -> float | None:
        """What the points dominate, see `search.pareto.hypervolume`."""
        return None if self.reference is None else hypervolume(self.losses(), self.reference)


def losses_of(points: Iterable[FrontPoint], terms: int) -> Losses:
    """(n_points, n_terms)."""
    return np.array([point.losses for point in points], dtype=np.float64).reshape(-1, terms)


def feasible_points(
    trials: Iterable[Trial], objective: Objective, origins: Mapping[int, str], items: ItemPool
) -> list[FrontPoint]:
    """The trials on a pool of items that keep the constraints, by candidate; without those that a race stopped.

    Args:
        objective: with normalisation fixed.
        origins: candidate -> origin.
    """
    found = [
        FrontPoint(trial.candidate, origins.get(trial.candidate, ""), objective.losses(trial.metrics), trial.metrics)
        for trial in trials
        if trial.items == items
        and not (trial.failure_kind or trial.censored)
        and objective.judge(trial.metrics).feasible
    ]
    return sorted(found, key=lambda point: point.candidate)


def front_of(trials: Iterable[Trial], objective: Objective, origins: Mapping[int, str], items: ItemPool) -> Front:
    """The front of the trials on a pool of items; of trials with equal losses the first candidate's.

    Args:
        objective, origins: see `feasible_points`.
    """
    scored = [trial for trial in trials if trial.items == items]
    points = feasible_points(scored, objective, origins, items)
    metrics = tuple(term.metric for term in objective.terms)
    chosen = front(losses_of(points, len(metrics)))
    parents = [
        objective.losses(trial.metrics)
        for trial in scored
        if origins.get(trial.candidate, "").startswith(PARENT) and not trial.failure_kind
    ]
    return Front(items, metrics, tuple(points[i] for i in chosen), reference_point(parents) if parents else None)


@dataclass
class FrontTracker:
    """The front on the search items while a run goes on; a result costs one comparison with its points.

    Args:
        objective: of the run; it is normalised when the parents are known.
        parents: how many parents the run has.
    """

    objective: Objective
    parents: int
    _waiting: list[tuple[Trial, str]] = field(default_factory=list)
    _parents: dict[int, Mapping[str, float] | None] = field(default_factory=dict)
    _reference: tuple[float, ...] | None = None
    _points: list[FrontPoint] = field(default_factory=list)
    _volume: float | None = None

    def note(self, trial: Trial, origin: str) -> None:
        """Take a trial into account, in the order of the history."""
        if trial.items != "search":
            return
        if origin.startswith(PARENT):
            self._parents[trial.candidate] = None if trial.failure_kind else trial.metrics
        if self._reference is not None:
            self._add(trial, origin)
            return
        self._waiting.append((trial, origin))
        found = [metrics for metrics in self._parents.values() if metrics is not None]
        if len(self._parents) < self.parents or not found:
            return
        self.objective = self.objective.against(found)
        self._reference = reference_point([self.objective.losses(metrics) for metrics in found])
        for waiting, its_origin in self._waiting:
            self._add(waiting, its_origin)
        self._waiting.clear()

    @property
    def size(self) -> int | None:
        """How many points the front has; None before the parents are known."""
        return None if self._reference is None else len(self._points)

    @property
    def hypervolume(self) -> float | None:
        """The volume that the front dominates; None before the parents are known."""
        if self._volume is None and self._reference is not None:
            self._volume = hypervolume(losses_of(self._points, len(self.objective.terms)), self._reference)
        return self._volume

    def front(self) -> Front:
        """The front as it is now."""
        metrics = tuple(term.metric for term in self.objective.terms)
        return Front("search", metrics, tuple(sorted(self._points, key=lambda p: p.losses)), self._reference)

    def _add(self, trial: Trial, origin: str) -> None:
        if trial.failure_kind or trial.censored or not self.objective.judge(trial.metrics).feasible:
            return
        losses = self.objective.losses(trial.metrics)
        known = losses_of(self._points, len(losses))
        if np.all(known <= np.asarray(losses), axis=1).any():
            return
        beaten = np.all(known >= np.asarray(losses), axis=1).tolist()
        self._points = [point for index, point in enumerate(self._points) if not beaten[index]]
        self._points.append(FrontPoint(trial.candidate, origin, losses, trial.metrics))
        self._volume = None

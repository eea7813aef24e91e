"""Bayesian optimisation in a trust region, from scores on parts of the items.

Candidates are asked where the surrogate's lower confidence bound is smallest, within a box around the best merge it
knows of; every fourth is the merge that it holds for the best, and now and then that one is scored on all items. The
box grows where these improve at its edge and shrinks where they do not (Eriksson et al. 2019, Scalable global
optimization via local Bayesian optimization, https://arxiv.org/abs/1910.01739). For up to some dozens of genes that
are numbers: it needs far fewer scored items than an evolution strategy, and more time of the driver for each candidate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from search.nevergrad_box import one_blas_thread
from search.objective import INFEASIBLE_LOSS
from search.optimizer import OptimizerOptions, Problem, Result, Vector
from search.surrogate import Observed, Surrogate

_MOST_POINTS = 320
"""So many points are remembered, those nearest to the best one."""
_MOST_OBSERVED = 480
"""Merges scored on all items are observed part by part, the latest ones first, up to so many observations."""
_REFIT = 1.15
_DRAWS, _SCALES = 100, (1.0, 0.5, 0.25, 0.1)
_FIRST = 6.0
"""Half a side of the first box in steps, times the root of the number of genes: so that its corners are as far."""
_SMALLEST, _LARGEST, _SHRINK, _GROW = 0.02, 0.5, 0.93, 1.3
_EDGE = 0.9
_EXPLOIT = 4
"""Every so many candidates, the one that is held for the best is asked, and no more uncertain one."""
_CAUTION = 0.4
"""Standard deviations by which a candidate must be sure to be held for the best."""
_JUMP, _RATE = 0.1, 1.0
"""Penalty, in standard deviations of the losses, of a candidate that violates constraints: at least, and for the
greatest violation besides."""


class GaussianProcessOptions(OptimizerOptions):
    """Keys beside `name`."""

    confirm: int | None = Field(
        None,
        ge=1,
        description="after so many candidates on parts of the items, the one held for the best is scored on all; by "
        "default twice as many as there are parts",
    )
    exploration: float = Field(
        0.3, ge=0, le=10, allow_inf_nan=False, description="how much an uncertain candidate is preferred to a sure one"
    )


@dataclass(frozen=True)
class _Point:
    """Attributes:
    parts: part -> loss; one that failed or violates a constraint has none.
    whole: whether all parts are there.
    violation: of the constraints; infinite for a failure.
    objective: the loss of one that violates constraints, but for these.
    """

    place: Vector
    parts: Mapping[int, float]
    whole: bool
    violation: float = 0.0
    objective: float = 0.0


class GaussianProcess:
    """Behind `search.optimizer.Optimizer`; BLAS runs on one thread inside."""

    Options = GaussianProcessOptions

    def __init__(self, problem: Problem) -> None:
        options = problem.options
        self._options = options if isinstance(options, GaussianProcessOptions) else GaussianProcessOptions()
        self._problem = problem
        self._random = np.random.Generator(np.random.PCG64(problem.seed))
        self._radius = self._first_radius = min(_FIRST * problem.step / math.sqrt(len(problem.start)), _LARGEST)
        self._points: list[_Point] = []
        self._suggested: deque[Vector] = deque()
        self._pending: list[Vector] = []
        self._exploits: list[tuple[Vector, bool]] = []
        self._since = self._asked = self._fitted = 0
        self._surrogate = Surrogate(len(problem.start))
        self._whole = self._feasible = False

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def take_member(self, point: Vector, result: Result) -> None:
        self._take(point, result)

    def ask(self) -> Vector:
        self._asked += 1
        if self._suggested or not self._known():
            self._whole = self._problem.parts == 1
            place = self._suggested.popleft() if self._suggested else self._near(self._problem.start)
            self._pending.append(place)
            return place
        self._since += 1
        self._whole = self._problem.parts == 1 or self._since == (self._options.confirm or 2 * self._problem.parts)
        exploit = self._asked % _EXPLOIT == 0
        if self._whole and self._problem.parts > 1:
            self._since, exploit = 0, True
        with one_blas_thread():
            place, at_edge = self._next(explore=not exploit)
        if exploit:
            self._exploits.append((place, at_edge))
        self._pending.append(place)
        return place

    def wants_all_items(self) -> bool:
        return self._whole

    def held_for_best(self, points: Sequence[Vector]) -> Vector:
        with one_blas_thread():
            self._surrogate.fit(self._observed()[0], sizes=False)
            return self._surrogate.bound(2 * np.stack(points) - 1, -_CAUTION)

    def expected_loss(self, point: Vector) -> float:
        with one_blas_thread():
            self._surrogate.fit(self._observed()[0], sizes=False)
            return float(self._surrogate.mean(2 * point[None] - 1)[0])

    def tell(self, point: Vector, loss: float) -> None:
        self.tell_result(point, Result(loss))

    def tell_result(self, point: Vector, result: Result) -> None:
        self._pending = _without(self._pending, point)
        self._take(point, result)

    def _take(self, point: Vector, result: Result) -> None:
        usable = result.loss < INFEASIBLE_LOSS
        parts = (result.parts or dict.fromkeys(range(self._problem.parts), result.loss)) if usable else {}
        violation = 0.0 if usable else result.violation or math.inf
        if usable and not self._feasible:
            # From now on it is the loss that is learned, about genes too that no constraint asked for.
            self._feasible, self._fitted, self._radius = True, 0, self._first_radius
        whole = len(parts) == self._problem.parts
        self._points.append(_Point(np.asarray(point, np.float64), parts, whole, violation, result.objective))

    def _known(self) -> list[_Point]:
        """What can be learned from: losses; before anything keeps the constraints, by how much they are violated."""
        if self._feasible:
            return [point for point in self._points if point.parts]
        parts = range(self._problem.parts)
        near = [point for point in self._points if math.isfinite(point.violation)]
        return [_Point(point.place, dict.fromkeys(parts, point.violation), True) for point in near]

    def _next(self, explore: bool) -> tuple[Vector, bool]:
        """Where the lower confidence bound, or without exploration the prediction, is smallest; whether at the edge."""
        from scipy.optimize import minimize

        observed, known = self._observed()
        sizes = len(observed.losses) >= _REFIT * self._fitted
        self._surrogate.fit(observed, sizes=sizes)
        if sizes:
            self._fitted = len(observed.losses)
        center = known[int(np.argmin(self._surrogate.mean(2 * known - 1)))]
        self._resize(center)
        if self._pending:
            self._surrogate.fit(self._with_pending(observed), sizes=False)
        weight = self._options.exploration * abs(self._random.normal()) if explore else 0.0
        low, high = np.maximum(center - self._radius, 0), np.minimum(center + self._radius, 1)
        draws = [center + self._radius * scale * self._random.normal(size=(_DRAWS, len(center))) for scale in _SCALES]
        tried = np.concatenate([center[None], *draws]).clip(low, high)
        begin = tried[int(np.argmin(self._surrogate.bound(2 * tried - 1, weight)))]
        found = minimize(
            lambda x: self._surrogate.bound_and_slope(x, weight),
            2 * begin - 1,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(2 * low - 1, 2 * high - 1, strict=True)),
            options={"maxiter": 40},
        )
        place = np.asarray((found.x + 1) / 2, np.float64).clip(low, high)
        at_edge = float(np.abs(place - center).max()) >= _EDGE * self._radius
        if any(np.array_equal(place, point.place) for point in self._points):
            place = self._near(place)
        return place, at_edge

    def _resize(self, center: Vector) -> None:
        """Of the box: larger where what was held for the best lay at its edge and is the best, else smaller."""
        for place, at_edge in self._exploits:
            if not any(np.array_equal(place, pending) for pending in self._pending):
                factor = _GROW if at_edge and np.array_equal(place, center) else _SHRINK
                self._radius = min(max(self._radius * factor, _SMALLEST), _LARGEST)
        self._exploits = [
            one for one in self._exploits if any(np.array_equal(one[0], pending) for pending in self._pending)
        ]

    def _near(self, place: Vector) -> Vector:
        return (place + self._radius / 4 * self._random.normal(size=len(place))).clip(0, 1)

    def _observed(self) -> tuple[Observed, Vector]:
        """What the surrogate learns from, and the points that were scored."""
        points = self._known()
        if len(points) > _MOST_POINTS:
            best = min((point for point in points if point.whole), key=_loss, default=points[-1])
            distance = np.array([np.abs(point.place - best.place).max() for point in points])
            points = [points[index] for index in np.sort(np.argsort(distance, kind="stable")[:_MOST_POINTS])]
        n_parts = self._problem.parts
        room = _MOST_OBSERVED - len(points)
        split = set()
        for index in reversed(range(len(points))):
            if points[index].whole and n_parts > 1 and room >= n_parts:
                room -= n_parts - 1
                split.add(index)
        places, shares, losses = [], [], []
        for index, point in enumerate(points):
            if point.whole and index not in split:
                places.append(point.place)
                shares.append(np.full(n_parts, 1 / n_parts))
                losses.append(_loss(point))
                continue
            for part, loss in point.parts.items():
                places.append(point.place)
                shares.append(np.eye(n_parts)[part])
                losses.append(loss)
        values = _tamed(np.array(losses))
        worse = self._worse()
        for point in worse:
            places.append(point.place)
            shares.append(np.full(n_parts, 1 / n_parts))
        return (
            Observed(2 * np.stack(places) - 1, np.stack(shares), np.concatenate([values, _beyond(values, worse)])),
            np.stack([point.place for point in points]),
        )

    def _worse(self) -> list[_Point]:
        """The latest of those that are only known to be worse than the rest."""
        worse = [point for point in self._points if not point.parts]
        if not self._feasible:
            worse = [point for point in worse if math.isinf(point.violation)]
        return worse[-_MOST_POINTS // 4 :]

    def _with_pending(self, observed: Observed) -> Observed:
        """As if those in flight had come as predicted: the next one looks elsewhere (Ginsbourger et al. 2010)."""
        places = 2 * np.stack(self._pending) - 1
        n_parts = observed.parts.shape[1]
        return Observed(
            np.concatenate([observed.points, places]),
            np.concatenate([observed.parts, np.full((len(places), n_parts), 1 / n_parts)]),
            np.concatenate([observed.losses, self._surrogate.mean(places)]),
        )


def _loss(point: _Point) -> float:
    return sum(point.parts.values()) / len(point.parts)


def _beyond(values: Vector, worse: Sequence[_Point]) -> Vector:
    """What is learned of those that are only known to be worse: of a failure the worst that is known; of one that
    violates constraints its objective and a penalty that grows with the violation."""
    violations = np.array([point.violation for point in worse])
    failed = np.isinf(violations)
    if failed.all():
        return np.full(len(worse), values.max())
    objectives = np.array([point.objective for point in worse])
    unit = float(np.concatenate([values, objectives[~failed]]).std()) or 1.0
    shares = violations[~failed] / violations[~failed].max()
    found = np.full(len(worse), values.max())
    found[~failed] = objectives[~failed] + unit * (_JUMP + _RATE * shares)
    return found


def _tamed(losses: Vector) -> Vector:
    """A broken merge is far worse than the rest, and a surrogate that fits it sees nothing else: far beyond nine in
    ten of them, by the logarithm."""
    best = float(losses.min())
    unit = float(np.quantile(losses, 0.9)) - best
    limit = best + 3 * unit
    if unit <= 0:
        return losses
    beyond = np.maximum(losses - limit, 0) / unit
    return np.minimum(losses, limit) + unit * np.log1p(beyond)


def _without(places: list[Vector], point: Vector) -> list[Vector]:
    """The list without the first one that is this."""
    for index, place in enumerate(places):
        if np.array_equal(place, point):
            return places[:index] + places[index + 1 :]
    return places


PLUGIN = GaussianProcess

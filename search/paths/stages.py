"""First the merge, then its path: two searches, one after the other, behind one optimiser.

This is the hybrid of Akiba 2025: the best merge joins the pool of layers, and what is searched then is the path
through them. The first search moves the genes of parameters and leaves the path as it is at the start; the second has
the parameters of the best candidate so far and moves the genes of the path.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from search.optimizer import (
    LearnsFromGeneration0,
    LearnsFromResults,
    MakeOptimizer,
    Optimizer,
    Problem,
    Result,
    Vector,
)
from search.seeds import derive_seed


class TwoStages:
    """Two optimisers of one kind (implements `Optimizer` and `LearnsFromResults`, and `LearnsFromGeneration0` where the
    first one does).

    The second begins when the first was asked its share of the budget. Results of the first that come later are still
    told to it, but change nothing.

    Args:
        problem: that of both.
        make: makes each of the two for its genes.
        parameters: number of genes of the first; they come first.
        share: of the budget, for the first.
    """

    def __init__(self, problem: Problem, make: MakeOptimizer, parameters: int, share: float) -> None:
        self._make, self._parameters = make, parameters
        first, self._second = two_problems(problem, parameters, share)
        self._first_asks = first.budget
        self._searches: list[Optimizer] = [make(first)]
        if isinstance(self._searches[0], LearnsFromGeneration0):
            # Only then: whoever has this method is not asked to suggest what it took.
            self.take_member = self._take_member
        self._fixed = problem.start
        self._best: tuple[float, Vector] | None = None
        self._asked = 0
        self._asked_by: dict[bytes, deque[int]] = {}

    def suggest(self, point: Vector) -> None:
        self._searches[-1].suggest(point[self._moved(len(self._searches) - 1)])

    def ask(self) -> Vector:
        if len(self._searches) == 1 and self._asked >= self._first_asks:
            self._begin_second()
        self._asked += 1
        stage = len(self._searches) - 1
        point = self._fixed.copy()
        point[self._moved(stage)] = self._searches[stage].ask()
        # Both may ask for the same point; results come in the order of asks.
        self._asked_by.setdefault(point.tobytes(), deque()).append(stage)
        return point

    def tell(self, point: Vector, loss: float) -> None:
        self.tell_result(point, Result(loss))

    def tell_result(self, point: Vector, result: Result) -> None:
        waiting = self._asked_by[point.tobytes()]
        stage = waiting.popleft()
        if not waiting:
            del self._asked_by[point.tobytes()]
        if stage == 0:
            self._note(point, result)
        search, moved = self._searches[stage], point[self._moved(stage)]
        if isinstance(search, LearnsFromResults):
            search.tell_result(moved, result)
        else:
            search.tell(moved, result.loss)

    def _take_member(self, point: Vector, result: Result) -> None:
        """A merge on another path than that of the first search is not one of its points."""
        first, path = self._searches[0], self._moved(1)
        if isinstance(first, LearnsFromGeneration0) and np.array_equal(point[path], self._fixed[path]):
            first.take_member(point[self._moved(0)], result)
            self._note(point, result)

    def _note(self, point: Vector, result: Result) -> None:
        """Keep the best of the first search."""
        if not result.censored and (self._best is None or result.loss < self._best[0]):
            self._best = (result.loss, point.copy())

    def _begin_second(self) -> None:
        if self._best is not None:
            self._fixed = self._best[1]
        self._searches.append(self._make(self._second))
        self._searches[1].suggest(self._second.start)  # costs nothing: the best merge was evaluated

    def _moved(self, stage: int) -> slice:
        """The genes of a stage."""
        return slice(None, self._parameters) if stage == 0 else slice(self._parameters, None)


def two_problems(problem: Problem, parameters: int, share: float) -> tuple[Problem, Problem]:
    """What each of two optimisers is asked to solve; see `TwoStages`. A path starts where it was all the time."""
    first = max(1, round(share * problem.budget))
    return (
        replace(problem, start=problem.start[:parameters].copy(), budget=first, genes=problem.genes[:parameters]),
        replace(
            problem,
            start=problem.start[parameters:].copy(),
            budget=max(1, problem.budget - first),
            genes=problem.genes[parameters:],
            seed=derive_seed(problem.seed, "path"),
        ),
    )


def in_two_stages(make: MakeOptimizer, parameters: int, share: float) -> MakeOptimizer:
    """A maker of `TwoStages`; see there."""
    return lambda problem: TwoStages(problem, make, parameters, share)

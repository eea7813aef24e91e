"""First the merge, then its path: two searches, one after the other, behind one optimiser.

This is the hybrid of Akiba 2025: the best merge joins the pool of layers, and what is searched then is the path
through them. The first search moves the genes of parameters and leaves the path as it is at the start; the second has
the parameters of the best candidate so far and moves the genes of the path.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from search.optimizer import LearnsFromResults, MakeOptimizer, Optimizer, Problem, Result, Vector
from search.seeds import derive_seed


class TwoStages:
    """Two optimisers of one kind (implements `Optimizer` and `LearnsFromResults`).

    The second begins when the first was asked its share of the budget. Results of the first that come later are still
    told to it, but change nothing.

    Args:
        problem: that of both.
        make: makes each of the two for its genes.
        parameters: number of genes of the first; they come first.
        share: of the budget, for the first.
    """

    def __init__(self, problem: Problem, make: MakeOptimizer, parameters: int, share: float) -> None:
        self._problem, self._make, self._parameters = problem, make, parameters
        self._first_asks = max(1, round(share * problem.budget))
        first = replace(
            problem, start=problem.start[:parameters], budget=self._first_asks, genes=problem.genes[:parameters]
        )
        self._searches: list[Optimizer] = [make(first)]
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
        if stage == 0 and not result.censored and (self._best is None or result.loss < self._best[0]):
            self._best = (result.loss, point.copy())
        search, moved = self._searches[stage], point[self._moved(stage)]
        if isinstance(search, LearnsFromResults):
            search.tell_result(moved, result)
        else:
            search.tell(moved, result.loss)

    def _begin_second(self) -> None:
        if self._best is not None:
            self._fixed = self._best[1]
        moved = self._moved(1)
        second = replace(
            self._problem,
            start=np.ascontiguousarray(self._fixed[moved]),
            budget=max(1, self._problem.budget - self._first_asks),
            genes=self._problem.genes[moved],
            seed=derive_seed(self._problem.seed, "path"),
        )
        self._searches.append(self._make(second))
        self._searches[1].suggest(second.start)  # costs nothing: the best merge was evaluated

    def _moved(self, stage: int) -> slice:
        """The genes of a stage."""
        return slice(None, self._parameters) if stage == 0 else slice(self._parameters, None)


def in_two_stages(make: MakeOptimizer, parameters: int, share: float) -> MakeOptimizer:
    """A maker of `TwoStages`; see there."""
    return lambda problem: TwoStages(problem, make, parameters, share)

"""NSGA-II in steady state (Deb et al. 2002, https://doi.org/10.1109/4235.996017; one child at a time as in Durillo et
al. 2009, "On the effect of the steady-state selection scheme in multi-objective genetic algorithms").

Every result enters the population at once; when that is full, the most crowded point of its last front leaves it.
Parents win binary tournaments by constrained domination, then by crowding distance. Children come from simulated
binary crossover (Deb & Agrawal 1995, Complex Systems 9) and polynomial mutation (Deb & Goyal 1996, Computer Science and
Informatics 26) in the unit box; genes that are no real numbers are taken from either parent and mutate to any value.

nevergrad's own mode for several losses is not used. It turns them into one, the hypervolume with all points so far, up
to the worst of the first 15, so the loss of a point depends on what came before it; only differential evolution looks
at the losses themselves, in a version that its source calls very basic and experimental; and constraints are penalties
on that one loss, not feasibility first (nevergrad 1.0.12, `multiobjective/core.py` and `differentialevolution.py`).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from search.optimizer import Problem, Result, Vector
from search.pareto.dominance import crowding, crowding_by_rank, ranks

POPULATION = 24
"""Points that are kept. A merge search has hundreds of candidates, not the tens of thousands that the 100 of the paper
were chosen for. The front that a run reports is that of all its trials, so it may have more points."""
RANDOM_SHARE = 0.5
"""Of the population, the share that is filled with random points before the first children."""
CROSSOVER_PROBABILITY = 0.9
CROSSOVER_INDEX = 10.0
"""The larger, the closer children are to their parents (eta_c)."""
MUTATION_INDEX = 5.0
"""The larger, the smaller the steps of mutation (eta_m). On ZDT1-3 and DTLZ2 with 150 and with 500 evaluations, 5 gave
a larger hypervolume than the usual 20 in every case."""


class Nsga2:
    """Finds a front; `search.optimizer.LearnsFromResults`. What is asked depends on seed, genes, and results in their
    order. With one loss it is a genetic algorithm that keeps the best."""

    def __init__(self, problem: Problem) -> None:
        self._random = np.random.Generator(np.random.PCG64(problem.seed))
        self._dimension = len(problem.start)
        self._real = np.array([gene.kind == "float" for gene in problem.genes] or [True] * self._dimension)
        self._random_left = round(RANDOM_SHARE * POPULATION)
        self._suggested: deque[Vector] = deque()
        self._points = np.empty((0, self._dimension))
        self._losses: NDArray[np.float64] = np.empty((0, 0))
        self._violations = np.empty(0)
        self._rank = np.empty(0, dtype=np.int64)
        self._crowding = np.empty(0)

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def ask(self) -> Vector:
        if self._suggested:
            return self._suggested.popleft()
        if self._random_left > 0 or not len(self._points):
            self._random_left -= 1
            return self._random.random(self._dimension)
        first, second = self._points[self._tournament()], self._points[self._tournament()]
        return self._mutated(self._crossed(first, second))

    def tell(self, point: Vector, loss: float) -> None:
        self.tell_result(point, Result(loss, (loss,)))

    def take_member(self, point: Vector, result: Result) -> None:
        self.tell_result(point, result)

    def tell_result(self, point: Vector, result: Result) -> None:
        """Failures teach nothing; of what was stopped early the losses are not those of its neighbours."""
        if not result.losses or result.censored:
            return
        losses = np.array([result.losses], dtype=np.float64)
        self._points = np.concatenate([self._points, point[None, :]])
        self._losses = np.concatenate([self._losses, losses]) if self._losses.size else losses
        self._violations = np.append(self._violations, result.violation)
        self._rank = ranks(self._losses, self._violations)
        self._crowding = crowding_by_rank(self._losses, self._rank)
        if len(self._points) > POPULATION:
            # The last front, there the most crowded point, of equal ones the oldest.
            gone = int(np.lexsort((self._crowding, -self._rank))[0])
            self._drop(gone)

    def _drop(self, gone: int) -> None:
        """Take away a point of the last front: the others stay where they are, its neighbours get more room."""
        kept = np.arange(len(self._points)) != gone
        rank = self._rank[gone]
        self._points, self._losses = self._points[kept], self._losses[kept]
        self._violations, self._rank, self._crowding = self._violations[kept], self._rank[kept], self._crowding[kept]
        front = np.flatnonzero(self._rank == rank)
        self._crowding[front] = crowding(self._losses[front])

    def _tournament(self) -> int:
        """The better of two random points: the lower front, then more room around it; a draw goes to the first."""
        one, other = (int(index) for index in self._random.integers(len(self._points), size=2))
        if self._rank[one] != self._rank[other]:
            return one if self._rank[one] < self._rank[other] else other
        return one if self._crowding[one] >= self._crowding[other] else other

    def _crossed(self, first: Vector, second: Vector) -> Vector:
        """A child of two points: simulated binary crossover, bounded, one of its two children by chance per gene."""
        crossed, chosen, spread_draw, side = self._random.random((4, self._dimension))
        if self._random.random() >= CROSSOVER_PROBABILITY:
            return first.copy()
        low, high = np.minimum(first, second), np.maximum(first, second)
        apart = high - low
        real = self._real & (crossed < 0.5) & (apart > 1e-14)
        width = np.where(apart > 1e-14, apart, 1.0)
        upper = side < 0.5
        # The spread factor beta, such that the child stays in the box: (1) the distance to the bound that it can reach.
        room = np.where(upper, 1.0 - high, low)
        alpha = 2.0 - (1.0 + 2.0 * room / width) ** -(CROSSOVER_INDEX + 1.0)
        inner = spread_draw <= 1.0 / alpha
        base = np.where(inner, spread_draw * alpha, 1.0 / np.where(inner, 1.0, 2.0 - spread_draw * alpha))
        beta = base ** (1.0 / (CROSSOVER_INDEX + 1.0))
        middle = 0.5 * (low + high)
        child = np.where(upper, middle + 0.5 * beta * width, middle - 0.5 * beta * width)
        inherited = np.where(~self._real & (chosen < 0.5), second, first)
        return np.where(real, np.clip(child, 0.0, 1.0), inherited)

    def _mutated(self, child: Vector) -> Vector:
        """Polynomial mutation of one gene on average, and of at least one."""
        draws, sizes = self._random.random((2, self._dimension))
        mutated = draws < 1.0 / self._dimension
        mutated[int(np.argmin(draws))] = True
        below = sizes < 0.5
        room = np.where(below, 1.0 - child, child) ** (MUTATION_INDEX + 1.0)
        power = 1.0 / (MUTATION_INDEX + 1.0)
        down = (2.0 * sizes + (1.0 - 2.0 * sizes) * room) ** power - 1.0
        up = 1.0 - (2.0 * (1.0 - sizes) + (2.0 * sizes - 1.0) * room) ** power
        moved = np.clip(child + np.where(below, down, up), 0.0, 1.0)
        return np.where(mutated, np.where(self._real, moved, sizes), child)


PLUGIN = Nsga2

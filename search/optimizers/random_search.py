"""Uniform random points: the floor that every other optimiser must beat (Bergstra & Bengio 2012)."""

from __future__ import annotations

from collections import deque

import numpy as np

from search.optimizer import Problem, Vector


class RandomSearch:
    """Uniform over the box; suggestions first."""

    def __init__(self, problem: Problem) -> None:
        self._generator = np.random.Generator(np.random.PCG64(problem.seed))
        self._dimension = len(problem.start)
        self._suggested: deque[Vector] = deque()

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def ask(self) -> Vector:
        return self._suggested.popleft() if self._suggested else self._generator.random(self._dimension)

    def tell(self, point: Vector, loss: float) -> None:
        """Random search does not learn."""


PLUGIN = RandomSearch

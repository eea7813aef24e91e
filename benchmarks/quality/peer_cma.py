"""CMA-ES as mergekit-evolve sets it up: pycma's defaults, all weights 1/n at first, first step 1/6 of a weight.

mergekit-evolve leaves weights without bounds; here they are clipped to those of the search, which are wide. It scores
every candidate on all items and knows no generation 0, so the benchmark counts only what this optimiser asked for.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from search.nevergrad_box import import_cma, one_blas_thread
from search.optimizer import Problem, Vector

SIGMA = 1 / 6


class PeerCma:
    """Behind `search.optimizer.Optimizer`; expects a window of 1."""

    def __init__(self, problem: Problem) -> None:
        genes = problem.genes
        self._low = np.array([gene.low for gene in genes])
        self._width = np.array([gene.high - gene.low for gene in genes])
        start = np.array([gene.initial for gene in genes])
        with one_blas_thread():
            options = {"seed": problem.seed % 2**31 or 1, "verbose": -9, "maxiter": 10**9}
            self._es = import_cma().CMAEvolutionStrategy(start, SIGMA, options)
        self._waiting: deque[Vector] = deque()
        self._asked: deque[Vector] = deque()
        self._told: list[tuple[Vector, float]] = []

    def suggest(self, point: Vector) -> None:
        """It starts where it starts."""

    def ask(self) -> Vector:
        if not self._waiting:
            with one_blas_thread():
                self._waiting.extend(self._es.ask())
        weights = self._waiting.popleft()
        self._asked.append(weights)
        return np.asarray(((weights - self._low) / self._width).clip(0.0, 1.0))

    def tell(self, point: Vector, loss: float) -> None:
        self._told.append((self._asked.popleft(), loss))
        if len(self._told) == self._es.popsize:
            with one_blas_thread():
                self._es.tell([x for x, _ in self._told], [loss for _, loss in self._told])
            self._told = []


PLUGIN = PeerCma

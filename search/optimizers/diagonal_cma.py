"""CMA-ES with a diagonal covariance and a first step that fits the box (Ros & Hansen 2008, sep-CMA-ES).

nevergrad's own variants start a bounded search with steps of 2-4 % of the range, which wastes most of a
merge search's budget, and from 300 genes on use a step-size rule that does not allow candidates in
flight; both are set here. The driver owns stopping, so pycma's rules that end a search without progress are off;
after those that are left (divergence, thousands of generations) it begins again at the first point.

What is asked is, bit for bit, what nevergrad's `ParametrizedCMA` asks with these settings. It stands here without
nevergrad's parameter objects because they, made several times for every candidate, were most of what the driver
spent on one.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from search.nevergrad_box import import_cma, one_blas_thread
from search.optimizer import Problem, Vector

_SIGMA = 1 / 6
"""nevergrad's standard deviation on the range of a bounded gene."""
# On [0, 1], nevergrad turns `scale` into a standard deviation of about this much per unit.
_DEVIATION_PER_SCALE = 0.195 / 8
_MANY_GENES = 18
"""From so many genes on, nevergrad halves the first step."""


class Cma:
    """pycma behind `search.optimizer.Optimizer`. BLAS runs on one thread inside.

    Args:
        diagonal: whether genes vary independently of each other; else the whole covariance is learned.
    """

    def __init__(self, problem: Problem, *, diagonal: bool) -> None:
        self._diagonal = diagonal
        self._genes = len(problem.start)
        # pycma wants two dimensions at least: a second one that means nothing.
        self._start = problem.start.copy() if self._genes > 1 else np.append(problem.start, 0.5)
        dimension = len(self._start)
        self._random = np.random.RandomState(problem.seed)
        self._popsize = max(problem.window, 4 + int(3.0 * np.log(dimension)))
        self._first_step = problem.step / _DEVIATION_PER_SCALE * (0.3 if dimension < _MANY_GENES else 0.15)
        self._es: Any = None
        # pycma takes one generation for each that it drew. At the end of a budget more are told, which wait for
        # an extension of the run.
        self._drawn = False
        self._suggested: deque[Vector] = deque()
        self._sampled: deque[Vector] = deque()
        self._told: list[tuple[Vector, float]] = []
        self._asked: dict[bytes, deque[Vector]] = {}

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def ask(self) -> Vector:
        if self._suggested:
            suggested = self._suggested.popleft()
            full = suggested if self._genes > 1 else np.append(suggested, 0.5)
        else:
            if not self._sampled:
                with one_blas_thread():
                    self._sampled.extend(self._strategy().ask())
                self._drawn = True
            full = _bounced(_SIGMA * (self._sampled.popleft() + self._start / _SIGMA))
        point = full[: self._genes].copy()
        self._asked.setdefault(point.tobytes(), deque()).append(full)
        return point

    def tell(self, point: Vector, loss: float) -> None:
        waiting = self._asked[point.tobytes()]
        self._told.append(((waiting.popleft() - self._start) / _SIGMA, loss))
        if not waiting:
            del self._asked[point.tobytes()]
        strategy = self._strategy()
        if self._drawn and len(self._told) >= self._popsize:
            told, self._told = self._told[: self._popsize], self._told[self._popsize :]
            self._drawn = False
            with one_blas_thread():
                strategy.tell([x for x, _ in told], [loss for _, loss in told])

    def _strategy(self) -> Any:
        """The evolution strategy; a new one after the old one stopped."""
        if self._es is None or self._es.stop():
            cma = import_cma()
            options = {
                "popsize": self._popsize,
                "randn": self._random.randn,
                "CMA_diagonal": self._diagonal,
                "CMA_elitist": False,
                "verbose": -9,
                "seed": np.nan,
                "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
                "tolx": 0,
                "tolfun": 0,
                "tolfunhist": 0,
                "tolflatfitness": 10**9,
                "tolstagnation": 10**9,
            }
            self._drawn = False
            self._es = cma.CMAEvolutionStrategy(x0=np.zeros(len(self._start)), sigma0=self._first_step, inopts=options)
        return self._es


def _bounced(point: Vector) -> Vector:
    """A point in the box; coordinates outside are mirrored at the border, once."""
    if ((point >= 0.0) & (point <= 1.0)).all():
        return point
    clipped = point.clip(0.0, 1.0)
    return (2 * clipped - point).clip(0.0, 1.0)


def PLUGIN(problem: Problem) -> Cma:  # noqa: N802 - the name that registries look for
    """Make the optimiser for a problem."""
    return Cma(problem, diagonal=True)

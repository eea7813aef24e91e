"""MAP-Elites over the terms of the objective: for each an archive whose cells are what the others reach (Mouret & Clune
2015, https://arxiv.org/abs/1504.04909; Kuroki 2025, CycleQD, https://arxiv.org/abs/2410.14735)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from search.gene_mixing import GeneMixing, draw
from search.optimizer import OptimizerOptions, Problem, Result, Vector

Cell = tuple[int, ...]

_LOW, _HIGH = 0.5, 0.8
"""Weight of an elite for each term, from the worst of its archive to the best (Kuroki 2025, elite sampling)."""

_LOSSES = (-1.0, 2.0)
"""Range of normalised losses over which the cells lie; 0 is the best parent, 1 the worst. What is beyond is in the
outermost cells."""


class Options(OptimizerOptions):
    """Options of map_elites."""

    cells: int = Field(12, ge=2, le=1000, description="cells of an archive along each of its axes")
    founders: int = Field(16, ge=1, le=10_000, description="candidates near the start before the first crossover")
    crossover: float = Field(0.7, ge=0, le=1, description="share of the candidates that have two parents")
    pressure: float = Field(
        8.0, ge=0, le=100, description="how much more often good elites are parents: 1 as published, 0 not at all"
    )
    mutation: float = Field(0.05, ge=0, le=1, description="deviation of mutations, as a fraction of a gene's range")


@dataclass(frozen=True)
class Elite:
    """The best of a cell so far. `losses` are those of all terms."""

    point: Vector
    losses: tuple[float, ...]
    violation: float


class Archive:
    """Elites by cell; `quality` is the term whose loss decides. What violates constraints less comes first."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        self.elites: dict[Cell, Elite] = {}

    def add(self, cell: Cell, elite: Elite) -> None:
        """Keep an elite if it is better than that of its cell."""
        known = self.elites.get(cell)
        if known is None or self._rank(elite) < self._rank(known):
            self.elites[cell] = elite

    def _rank(self, elite: Elite) -> tuple[float, float]:
        return elite.violation, elite.losses[self._quality]

    def choices(self, pressure: float = 1.0) -> tuple[list[Elite], NDArray[np.float64]]:
        """The elites that can be parents, and how often each is: the product over the terms of how good it is, to the
        power of the pressure."""
        elites = list(self.elites.values())
        elites = [elite for elite in elites if elite.violation == 0] or elites
        losses = np.array([elite.losses for elite in elites])
        low = losses.min(axis=0)
        width = losses.max(axis=0) - low
        goodness = 1 - (losses - low) / np.where(width > 0, width, 1.0)
        return elites, np.prod(_LOW + goodness * (_HIGH - _LOW), axis=1) ** pressure


class MapElites:
    """With several terms one archive for each, asked in turn. With one term the axes of its archive are the means of
    the genes in the front and in the rear half of the model, so that it holds good merges of every make-up.

    Children are (w_1 A + w_2 B) / (w_1 + w_2) of their genes with w ~ N(1, 0.01), mutated; genes without an order come
    from either parent.
    """

    Options: ClassVar[type[OptimizerOptions]] = Options

    def __init__(self, problem: Problem) -> None:
        self._options = problem.options if isinstance(problem.options, Options) else Options()
        self._start, self._step = problem.start, problem.step
        self._generator = np.random.Generator(np.random.PCG64(problem.seed))
        self._genes = GeneMixing(problem)
        forward = np.argsort(self._genes.positions, kind="stable")
        middle = max(len(forward) // 2, 1)
        self._halves = forward[:middle], forward[middle:]
        self._suggested: deque[Vector] = deque()
        self._asked = 0
        self.archives = [Archive(term) for term in range(problem.objectives)]

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def take_member(self, point: Vector, result: Result) -> None:
        self._asked += 1
        self.tell_result(point, result)

    def ask(self) -> Vector:
        self._asked += 1
        if self._suggested:
            return self._suggested.popleft()
        archive = self.archives[self._asked % len(self.archives)]
        if self._asked <= self._options.founders or not archive.elites:
            return self._genes.mutate(self._start, self._step, self._generator)
        elites, weights = archive.choices(self._options.pressure)
        first, second = (elites[draw(weights, number)] for number in self._generator.random(2))
        child = first.point
        if self._generator.random() < self._options.crossover:
            one, two = 1 + 0.01 * self._generator.standard_normal(2)
            child = self._genes.mix(first.point, second.point, two / (one + two), self._generator)
        return self._genes.mutate(child, self._options.mutation, self._generator)

    def tell(self, point: Vector, loss: float) -> None:
        self.tell_result(point, Result(loss, (loss,) * len(self.archives)))

    def tell_result(self, point: Vector, result: Result) -> None:
        if result.censored or not result.losses:
            return
        elite = Elite(point, result.losses, result.violation)
        for term, archive in enumerate(self.archives):
            archive.add(self.cell(elite, term), elite)

    def cell(self, elite: Elite, term: int) -> Cell:
        """Where an elite belongs in the archive of a term."""
        if len(self.archives) == 1:
            axes = [float(elite.point[half].mean()) if len(half) else 0.0 for half in self._halves]
            low, high = 0.0, 1.0
        else:
            axes = [loss for other, loss in enumerate(elite.losses) if other != term]
            low, high = _LOSSES
        cells = self._options.cells
        return tuple(min(max(int((value - low) / (high - low) * cells), 0), cells - 1) for value in axes)


PLUGIN = MapElites

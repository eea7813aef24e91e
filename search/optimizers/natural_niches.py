"""Natural niches: members compete for items, and mate with those that are good where they are not (Abrantes 2025, M2N2,
https://arxiv.org/abs/2508.16204)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from search.gene_mixing import GeneMixing, draw
from search.item_shares import Array, ItemTable, attraction, competition, scaled
from search.optimizer import OptimizerOptions, Problem, Result, Vector

LONGEST_STEP = 3.0
"""Mutations of a pure child are at most so many times as large as those of a blended one."""


class Options(OptimizerOptions):
    """Options of natural_niches."""

    archive: int = Field(15, ge=2, le=10_000, description="members that are kept")
    alpha: float = Field(
        1.0, ge=0, le=10, description="how hard members compete for an item: 0 not at all, 1 for equal parts of it"
    )
    crossover: Literal["blend", "pure"] = Field(
        "blend",
        description="blend: the ratio of the parents is turned round at the split, as published; pure: before the "
        "split all genes of one parent, so that hidden states can be used again, behind it a mix of both, the fewer "
        "genes the larger their mutations",
    )
    mutation: float = Field(0.05, ge=0, le=1, description="deviation of mutations, as a fraction of a gene's range")


@dataclass(frozen=True)
class Member:
    """A genome of the archive. `row` is that of `ItemTable`, NaN for items that it was not scored on."""

    point: Vector
    row: Array
    loss: float
    violation: float


class NaturalNiches:
    """Steady state: every result competes with the archive, every ask mates two members.

    Members that violate a constraint stay only while the archive has room. A candidate whose evaluation failed or was
    stopped early never becomes a member. Members may lack items, as when candidates are scored on subsets that grow:
    on an item those compete that have it.
    """

    Options: ClassVar[type[OptimizerOptions]] = Options

    def __init__(self, problem: Problem) -> None:
        self._options = problem.options if isinstance(problem.options, Options) else Options()
        self._start, self._step = problem.start, problem.step
        self._generator = np.random.Generator(np.random.PCG64(problem.seed))
        self._genes = GeneMixing(problem)
        self._cuts = _useful_cuts(self._genes.positions)
        self._forward = np.argsort(self._genes.positions, kind="stable")
        self._table = ItemTable(problem.terms)
        self._suggested: deque[Vector] = deque()
        self._founders = 0
        # Kept, since allocating them for every candidate would take longer than what is done with them.
        self._shares: Array = np.zeros((0, 0))
        self._room: Array = np.zeros((0, 0))
        self.members: list[Member] = []

    def suggest(self, point: Vector) -> None:
        self._suggested.append(point)

    def take_member(self, point: Vector, result: Result) -> None:
        self._founders += 1
        self.tell_result(point, result)

    def ask(self) -> Vector:
        founding = self._founders < self._options.archive
        self._founders += founding
        if self._suggested:
            return self._suggested.popleft()
        if founding or len(self.members) < 2:
            return self._genes.mutate(self._start, self._step, self._generator)
        return self._child()

    def tell(self, point: Vector, loss: float) -> None:
        self.tell_result(point, Result(loss, (loss,)))

    def tell_result(self, point: Vector, result: Result) -> None:
        if result.censored or any(np.array_equal(point, member.point) for member in self.members):
            return
        row = self._table.row(result)
        if row is None:
            return
        if self.members and len(self.members[0].row) != len(row):  # new items, as often as subsets grow
            self.members = [replace(member, row=_padded(member.row, len(row))) for member in self.members]
        self.members.append(Member(point, row, result.loss, result.violation))
        if len(self.members) > self._options.archive:
            fitness, _, _ = self._fitness()

            def rank(index: int) -> tuple[float, float, float, int]:
                member = self.members[index]
                return member.violation, -float(fitness[index]), member.loss, index

            # The worst goes; among equals the youngest.
            del self.members[max(range(len(self.members)), key=rank)]

    def _fitness(self) -> tuple[Array, Array, list[int]]:
        """The fitness of all members (0 for those that do not compete); the shares of those that do; which they are:
        the feasible ones, if there are any."""
        rivals = [index for index, member in enumerate(self.members) if member.violation == 0]
        rivals = rivals or list(range(len(self.members)))
        if self._shares.shape[1] != len(self._table.capacities):
            self._shares, self._room = np.zeros((2, self._options.archive + 1, len(self._table.capacities)))
        shares = self._shares[: len(rivals)]
        np.stack([self.members[index].row for index in rivals], out=shares)
        scaled(shares, out=shares)
        fitness = np.zeros(len(self.members))
        fitness[rivals] = competition(shares, self._table.capacities, self._options.alpha)
        return fitness, shares, rivals

    def _child(self) -> Vector:
        fitness, shares, rivals = self._fitness()
        first = self._draw(fitness[rivals])
        wanted = attraction(first, shares, self._table.capacities, out=self._room[: len(rivals)])
        if not wanted.any():  # none is better anywhere: any other will do
            wanted = np.ones(len(rivals))
        wanted[first] = 0.0
        if len(rivals) == 1:
            return self._genes.mutate(self.members[rivals[0]].point, self._step, self._generator)
        second = self._draw(wanted)
        return self._crossed(self.members[rivals[first]].point, self.members[rivals[second]].point)

    def _crossed(self, first: Vector, second: Vector) -> Vector:
        ratio = self._generator.random()
        if self._options.crossover == "blend":
            split = int(self._generator.integers(len(first) + 1))
            share = np.full(len(first), 1 - ratio)
            share[self._forward[:split]] = ratio
            return self._mutated(self._genes.mix(first, second, share, self._generator))
        cut = self._cuts[int(self._generator.integers(len(self._cuts)))]
        behind = self._genes.positions >= cut
        # A step of the same length in all, however few genes share it: late layers would hardly move otherwise.
        longer = min(float(np.sqrt(len(first) / behind.sum())), LONGEST_STEP)
        mixed = self._genes.mix(first, second, ratio, self._generator)
        return np.where(behind, self._genes.mutate(mixed, longer * self._options.mutation, self._generator), first)

    def _mutated(self, point: Vector) -> Vector:
        return self._genes.mutate(point, self._options.mutation, self._generator)

    def _draw(self, weights: Array) -> int:
        """An index, as often as its weight says."""
        if not weights.any():
            return int(self._generator.integers(len(weights)))
        return draw(weights, self._generator.random())


def _useful_cuts(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions in front of which a child may change from one parent to the other.

    Not the first layer, if there are genes before the layers: their states alone spare no layer, so whoever changes the
    first layer may as well change what stands before it.
    """
    cuts = np.unique(positions)
    return np.delete(cuts, 1) if len(cuts) > 2 and cuts[0] == 0 and cuts[1] == 1 else cuts


def _padded(row: Array, width: int) -> Array:
    """A row that lacks the items that became known after it."""
    return np.append(row, np.full(width - len(row), np.nan))


PLUGIN = NaturalNiches

"""What population methods do to genomes: mixing two, and mutation, by kind of gene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search.optimizer import Problem, Vector


def draw(weights: Vector, number: float) -> int:
    """An index, as often as its weight says, from a number drawn from [0, 1).

    Args:
        weights: (n,) not negative, at least one of them positive.
    """
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(weights) - 1)


class GeneMixing:
    """Crossover and mutation on the unit box.

    Numbers are interpolated and moved in steps. What has no order (choices, bools) is taken from one parent or the
    other, and changes to another value altogether.

    Args:
        problem: genes it says nothing of count as numbers before the layers.
    """

    def __init__(self, problem: Problem) -> None:
        genes = problem.genes
        count = len(problem.start)
        self.positions: NDArray[np.int64] = np.array([gene.position for gene in genes] or [0] * count, np.int64)
        self.ordered: NDArray[np.bool_] = np.array([gene.ordered for gene in genes] or [True] * count, np.bool_)
        self._values = np.array([max(len(gene.choices), 2) for gene in genes] or [2] * count, np.int64)
        self._flip = 1 / max(int((~self.ordered).sum()), 1)

    def mix(self, first: Vector, second: Vector, share: Vector | float, generator: np.random.Generator) -> Vector:
        """`1 - share` of the first and `share` of the second; genes without order are the second's that often.

        Args:
            first, second: (n_genes,)
            share: of the second, one for all or one for each gene.
        """
        between = (1 - share) * first + share * second
        taken = np.where(generator.random(len(first)) < share, second, first)
        return np.asarray(np.where(self.ordered, between, taken), np.float64)

    def mutate(self, point: Vector, deviation: float, generator: np.random.Generator) -> Vector:
        """Numbers move by a normal step of this deviation, mirrored at the border; one gene without order, on average,
        takes another of its values."""
        moved = point + deviation * generator.standard_normal(len(point))
        moved = np.abs(moved)
        moved = np.where(moved > 1, 2 - moved, moved).clip(0.0, 1.0)
        part = np.minimum((point * self._values).astype(np.int64), self._values - 1)
        shift = 1 + (generator.random(len(point)) * (self._values - 1)).astype(np.int64)
        other = ((part + shift) % self._values + 0.5) / self._values
        flipped = np.where(generator.random(len(point)) < self._flip, other, point)
        return np.asarray(np.where(self.ordered, moved, flipped if deviation > 0 else point), np.float64)

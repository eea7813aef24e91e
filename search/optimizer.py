"""What an optimiser is: ask and tell on the unit box, reproducible from a seed and the order of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.registry import Registry

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What an optimiser is made for. All of it is part of the run, since all of it changes the asks.

    Attributes:
        start: (n_genes,) coordinates in [0, 1] from which it starts.
        budget: candidates it will be asked for, as far as is known at the start: a run may be extended, or end early.
        window: candidates in flight at once.
        seed: seed of its random numbers.
        step: first step where the method has one, as a fraction of the range.
    """

    start: Vector
    budget: int
    window: int
    seed: int
    step: float


class Optimizer(Protocol):
    """Minimises a loss over the unit box; asks may run ahead of tells by the window."""

    def suggest(self, point: Vector) -> None:
        """Make `point` the next one that is asked; earlier suggestions come first."""

    def ask(self) -> Vector:
        """The next point, (n_genes,) float64 in [0, 1]."""

    def tell(self, point: Vector, loss: float) -> None:
        """The finite loss of a point, in the order of the history. The point was asked before."""


MakeOptimizer = Callable[[Problem], Optimizer]

OPTIMIZERS: Registry[MakeOptimizer] = Registry("optimizer", "search.optimizers", "meiosis.optimizers")

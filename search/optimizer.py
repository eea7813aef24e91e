"""What an optimiser is: ask and tell on the unit box, reproducible from a seed and the order of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from evaluators.base import Scores
from evaluators.registry import Registry
from search.genome import Gene
from search.objective import Term

Vector = NDArray[np.float64]


class OptimizerOptions(BaseModel):
    """Base of an optimiser's options, and the options of one that has none: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


NO_OPTIONS = OptimizerOptions()


@dataclass(frozen=True)
class Problem:
    """What an optimiser is made for. All of it is part of the run, since all of it changes the asks.

    Attributes:
        start: (n_genes,) coordinates in [0, 1] from which it starts.
        budget: candidates it will be asked for, as far as is known at the start: a run may be extended, or end early.
        window: candidates in flight at once.
        seed: seed of its random numbers.
        step: first step where the method has one, as a fraction of the range.
        genes: what the coordinates mean, in their order; empty where nobody said.
        objectives: how many losses a `Result` has.
        terms: what they are, in their order: metric, direction and weight; empty where nobody said.
        options: an instance of the optimiser's `Options`.
        parts: into how many parts the search items are cut; candidates are scored on one of them, or on all.
    """

    start: Vector
    budget: int
    window: int
    seed: int
    step: float
    genes: tuple[Gene, ...] = ()
    objectives: int = 1
    terms: tuple[Term, ...] = ()
    options: Any = NO_OPTIONS
    parts: int = 1


@dataclass(frozen=True)
class Result:
    """All that is known of a candidate that was evaluated.

    Attributes:
        loss: finite, smaller is better: what `Optimizer.tell` is given.
        losses: the normalised loss of every term of the objective, finite; empty for a failure.
        violation: by how much it violates the constraints, 0 for a feasible one.
        censored: whether its evaluation was stopped early, because it is worse than what it was compared with.
        scores: evaluator name -> per-item scores; empty for a failure.
        metrics: `<evaluator>.<metric>` -> value; empty for a failure.
        parts: part of the items -> what was measured there, in the unit of the loss, but for a constant; the mean over
            all parts is the loss. Empty for a failure, and where the items are not cut into parts.
        objective: the loss without regard to the constraints; 0 for a failure.
    """

    loss: float
    losses: tuple[float, ...] = ()
    violation: float = 0.0
    censored: bool = False
    scores: Mapping[str, Scores] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[int, float] = field(default_factory=dict)
    objective: float = 0.0


class Optimizer(Protocol):
    """Minimises a loss over the unit box; asks may run ahead of tells by the window."""

    def suggest(self, point: Vector) -> None:
        """Make `point` the next one that is asked; earlier suggestions come first."""

    def ask(self) -> Vector:
        """The next point, (n_genes,) float64 in [0, 1]."""

    def tell(self, point: Vector, loss: float) -> None:
        """The finite loss of a point, in the order of the history. The point was asked before."""


@runtime_checkable
class LearnsFromResults(Protocol):
    """An optimiser that wants to know more of a candidate than one number; has it, `tell` is not called."""

    def tell_result(self, point: Vector, result: Result) -> None:
        """What is known of a point, in the order of the history. The point was asked before."""


@runtime_checkable
class LearnsFromGeneration0(Protocol):
    """An optimiser with members, which can start from what generation 0 measured."""

    def take_member(self, point: Vector, result: Result) -> None:
        """A point that was not asked and what is known of its merge; before the first ask, in the order of the
        history."""


@runtime_checkable
class PoolsParts(Protocol):
    """An optimiser that puts together what candidates scored on different parts of the items."""

    def wants_all_items(self) -> bool:
        """Whether the point that was asked last is to be scored on all items."""

    def held_for_best(self, points: Sequence[Vector]) -> Vector:
        """(n,) by which losses points that were told, (n, n_genes), are to be ranked: what they are expected to be on
        all items, cautiously, but for a constant."""

    def expected_loss(self, point: Vector) -> float:
        """What a point that was told, (n_genes,), is expected to lose on all items, but for the same constant."""


MakeOptimizer = Callable[[Problem], Optimizer]
"""A function, or a class. It may have `Options`, a subclass of `OptimizerOptions` for the keys beside `name` in the
config; `Problem.options` is then an instance of it."""

OPTIMIZERS: Registry[MakeOptimizer] = Registry("optimizer", "search.optimizers", "meiosis.optimizers")


def options_class(name: str) -> type[OptimizerOptions]:
    """The options of an optimiser; those of nevergrad's registry have none.

    Raises:
        UserError: a plug-in that cannot be imported.
    """
    if name not in OPTIMIZERS.names() and ":" not in name:
        return OptimizerOptions
    return cast(type[OptimizerOptions], getattr(OPTIMIZERS.get(name), "Options", OptimizerOptions))


@dataclass(frozen=True)
class WithOptions:
    """The maker of an optimiser with these options."""

    make: MakeOptimizer
    options: OptimizerOptions

    def __call__(self, problem: Problem) -> Optimizer:
        return self.make(replace(problem, options=self.options))

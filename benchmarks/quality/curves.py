"""From the history of a run: which candidate was the best known after how many item-evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from search.candidate import SEARCHED
from search.population import Population
from search.store.events import Trial
from search.trials import may_be_best

_LOOK = 4
"""Where ranking takes time, it is looked up after every so many candidates."""


@dataclass(frozen=True)
class Step:
    """After so many item-evaluations, this candidate is the best known."""

    items: int
    candidate: int


class Incumbents:
    """Follows a run: the best known candidates, as the program itself ranks them, and the item-evaluations.

    A candidate that repeats an earlier recipe costs nothing.

    Args:
        population: has been told what is told here.
        from_zero: whether candidates of generation 0 count, as costs and as best ones.
    """

    def __init__(self, population: Population, from_zero: bool) -> None:
        self.population, self._from_zero = population, from_zero
        self._losses: dict[int, float] = {}
        self._zero: tuple[float, int] | None = None
        self._told = self.items = 0
        self.steps: list[Step] = []

    def told(self, trial: Trial) -> None:
        """The next result on the search items."""
        searched = self.population.candidate(trial.candidate).origin == SEARCHED
        if not (searched or self._from_zero):
            return
        if trial.attempts:
            self.items += sum(len(scores.items) for scores in trial.scores.values())
        if trial.loss is None:
            return
        if searched and may_be_best(trial):
            self._losses[trial.candidate] = trial.loss
            self._told += 1
            if not self.population.coverage.rotates:
                self._better(trial.candidate, self.population.coverage.cautious(trial.candidate, trial.loss))
            elif self._told % _LOOK == 0:
                self._step(self.population.ranked(self._losses)[0])
        elif may_be_best(trial, self.population.coverage.rotates):
            self._better(trial.candidate, self.population.coverage.cautious(trial.candidate, trial.loss))

    def _better(self, candidate: int, loss: float) -> None:
        if self._zero is None or loss < self._zero[0]:
            self._zero = loss, candidate
            self._step(candidate)

    def _step(self, candidate: int) -> None:
        if not self.steps or self.steps[-1].candidate != candidate:
            self.steps.append(Step(self.items, candidate))


def items_to_reach(steps: Sequence[Step], quality: Callable[[int], float], target: float) -> float:
    """Item-evaluations from which on the best known candidate is at least this good; infinite if it never is."""
    reached = np.inf
    for step in steps:
        if quality(step.candidate) > target:
            reached = np.inf
        elif np.isinf(reached):
            reached = step.items
    return float(reached)

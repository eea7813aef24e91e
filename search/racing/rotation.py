"""A fitness that scores every candidate on one part of the items, and the next one on another part.

Every comparison of two candidates on one part is as rough as the part is small; but an optimiser that puts all of them
together has seen every item after some dozens of candidates, for the price of a few that are scored on all items.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evaluators.base import Evaluator, Scores
from search.objective import Objective
from search.racing.config import FitnessConfig
from search.racing.fitness import Fitness, Role, Standing, Vector, coefficients_of
from search.racing.race import Race
from search.seeds import derive_seed

SMALLEST = 3
"""Items per evaluator of a part, at least; evaluators with at most so many are scored whole."""
_TO_DECIDE = 0.25
"""Share of the items on which a baseline decides between its attempts."""


class Rotation(Fitness):
    """See `Fitness`. Candidates of generation 0 are all scored on the first part, so that they can be compared; what
    decides inside a baseline, and the parents, are scored on more of them, the base on all items."""

    def __init__(self, config: FitnessConfig, evaluators: Mapping[str, Evaluator], seed: int, window: int) -> None:
        super().__init__(config, evaluators, seed, window)
        self._totals = dict(self.ladder.totals)
        cut = [total for total in self._totals.values() if total > SMALLEST]
        share = max(config.first, SMALLEST / min(cut)) if cut else 1.0
        self._parts = max(int(1 / share + 1e-9), 1)
        self._random = np.random.Generator(np.random.PCG64(derive_seed(seed, "parts")))
        self._turn: list[int] = []

    @property
    def parts(self) -> int:
        return self._parts

    @property
    def shares_parents(self) -> bool:
        return self._parts > 1 and self._config.parents < 1

    @property
    def next_items(self) -> int:
        return sum(self._totals.values())

    def race(self, objective: Objective, whole: bool, role: Role = "searched") -> Race:
        if whole or self._parts == 1:
            return Race((self._totals,))
        part, last = 0, 0
        if role == "searched":
            if not self._turn:
                self._turn = self._random.permutation(self._parts).tolist()
            part = last = self._turn.pop()
        elif role != "baseline":
            share = self._config.parents if role == "parent" else _TO_DECIDE
            last = min(int(share * self._parts), self._parts - 1)
        edges = {name: (self._edges(name, part)[0], self._edges(name, last)[1]) for name in self._totals}
        sizes = {name: end - begin for name, (begin, end) in edges.items()}
        return Race((sizes,), begin={name: begin for name, (begin, _) in edges.items()})

    def losses_of_parts(
        self, objective: Objective, metrics: Mapping[str, float], scores: Mapping[str, Scores]
    ) -> dict[int, float]:
        if self._parts == 1:
            return {}
        coefficients = coefficients_of(objective)
        chosen = self._parts_of(scores)
        found = dict.fromkeys(chosen, 0.0)
        for name, factors in coefficients.items():
            matrix, weights = self._in_order(name, scores[name])
            influence = self._row(name, matrix, factors)
            first = self._begin(name, scores[name])
            for part in chosen:
                begin, end = self._edges(name, part)
                here = slice(begin - first, end - first)
                if not weights[here].any():
                    continue
                # So that the mean over all parts is the weighted mean over all items, whatever their sizes.
                scale = 1.0 if self._is_uncut(name) else self._parts * self._share(name, weights[here])
                found[part] += scale * float(np.average(influence[here], weights=weights[here]))
        return found

    def rank(self, objective: Objective, standing: Standing) -> None:
        if standing.scores:
            self._errors[standing.candidate] = self._residuals(standing.scores, coefficients_of(objective))[1]

    def _is_uncut(self, name: str) -> bool:
        return self._totals[name] <= SMALLEST

    def _edges(self, name: str, part: int) -> tuple[int, int]:
        total = self._totals[name]
        if self._is_uncut(name):
            return 0, total
        return total * part // self._parts, total * (part + 1) // self._parts

    def _parts_of(self, scores: Mapping[str, Scores]) -> list[int]:
        """The parts that were scored, by where the items begin and end."""
        name = next(name for name in self._totals if not self._is_uncut(name))
        begin = self._begin(name, scores[name])
        end = begin + len(scores[name].items)
        edges = [self._edges(name, part) for part in range(self._parts)]
        return [part for part, (first, last) in enumerate(edges) if begin <= first and last <= end]

    def _begin(self, name: str, block: Scores) -> int:
        first = set(block.items)
        return next((place for place, item in enumerate(self._orders[name]) if item in first), 0)

    def _share(self, name: str, weights: Vector) -> float:
        """Of the weight of all items."""
        everything = self._strata[name].weights
        return len(weights) / self._totals[name] if everything is None else float(weights.sum() / everything.sum())

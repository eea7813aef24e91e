"""What a worker must know to end the evaluation of a hopeless candidate early: plain data, and the decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Scores
from search.racing.bounds import betting_log_wealth, mixture_log_evidence

Vector = NDArray[np.float64]


class Opponent(Protocol):
    """What a candidate is compared with while it is scored."""

    @property
    def loss(self) -> float:
        """A stopped candidate is told as no better than this."""

    def loses(self, scores: Mapping[str, Scores]) -> bool:
        """Whether a candidate with these scores on the first items is worse, beyond chance."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A candidate that others are compared with, item by item.

    The objective is a sum over evaluators of weighted means of `influence`, linear in the scores of an item.

    Attributes:
        loss: what the optimiser was told of it.
        coefficients: evaluator -> metric -> factor of a score in the objective.
        influence: evaluator -> (n,) of the reference, on the first items.
        mean_weights: evaluator -> mean weight of all its items.
        blocks, totals: how the items are cut, see `Ladder`.
        low: smallest possible sum, over the evaluators that are not scored whole from the start, of (weight / mean
            weight) (influence of a candidate minus that of the reference), where scores are bounded; None where they
            are not.
        scale: of the differences that are expected, in the unit of the loss.
        alpha: probability of stopping a candidate that is not worse.
    """

    loss: float
    coefficients: Mapping[str, Mapping[str, float]]
    influence: Mapping[str, Vector]
    mean_weights: Mapping[str, float]
    blocks: int
    totals: Mapping[str, int]
    low: float | None
    scale: float
    alpha: float

    def loses(self, scores: Mapping[str, Scores]) -> bool:
        """Whether a candidate with these scores on the first items is worse, beyond chance."""
        return self.log_evidence(scores) >= -math.log(self.alpha)

    def log_evidence(self, scores: Mapping[str, Scores]) -> float:
        """Logarithm of the evidence that a candidate with these scores on the first items is worse: the largest so far
        of an e-process, infinite where it is known, minus infinity where too little is seen.

        Evaluators are independent strata; of those that were scored whole the difference is known. Bounded scores are
        tested by betting on blocks of items, which holds for any sample; others by a normal mixture with the variance
        of the stratified mean.
        """
        differences = self.differences(scores)
        if differences is None:
            return -math.inf
        if self.low is not None:
            known = sum(
                float(scores[name].weights @ difference / (scores[name].weights.sum() or 1.0))
                for name, difference in differences.items()
                if self._is_whole(name, difference)
            )
            if self.low + known > 0:
                return math.inf  # whatever the other items are
            composite = known + self._composite(differences, scores)
            low = min(self.low + known, -1e-9 * abs(self.low))
            return float(betting_log_wealth(composite, low, self.blocks).max(initial=-math.inf))
        mean = variance = 0.0
        for name, difference in differences.items():
            weights, count = scores[name].weights, len(difference)
            if weights.sum() <= 0 or (count < 2 and not self._is_whole(name, difference)):
                return -math.inf
            here = float(weights @ difference / weights.sum())
            mean += here
            if self._is_whole(name, difference):
                continue
            around = weights / weights.mean() * (difference - here)
            # A small sample knows its variance badly: (n + 1) / (n - 1) is roughly what a t test allows for.
            spread = float(around @ around) / (count - 1) * (count + 1) / (count - 1)
            variance += (1 - count / self.totals[name]) * spread / count
        return mixture_log_evidence(mean, variance, self.scale)

    def differences(self, scores: Mapping[str, Scores]) -> dict[str, Vector] | None:
        """Evaluator -> (n_seen,) influence of the candidate minus that of the reference; None where the reference was
        scored on fewer items."""
        found: dict[str, Vector] = {}
        for name, factors in self.coefficients.items():
            block = scores[name]
            if len(block.items) > len(self.influence[name]):
                return None
            own = sum((factor * block.values[metric] for metric, factor in factors.items()), np.zeros(len(block.items)))
            found[name] = own - self.influence[name][: len(block.items)]
        return found

    def known_difference(self, scores: Mapping[str, Scores]) -> float | None:
        """The difference of the losses; None where not all items were scored."""
        found = self.differences(scores)
        if found is None or not all(self._is_whole(name, difference) for name, difference in found.items()):
            return None
        return sum(
            float(scores[name].weights @ difference / (scores[name].weights.sum() or 1.0))
            for name, difference in found.items()
        )

    def _is_whole(self, name: str, difference: Vector) -> bool:
        """Whether these are all items of an evaluator: nothing is asked after the last rung, so it has few."""
        return len(difference) == self.totals[name]

    def _composite(self, differences: Mapping[str, Vector], scores: Mapping[str, Scores]) -> Vector:
        """(blocks seen,) the sum over the evaluators that are cut of their means in a block; its mean over all is the
        difference.

        Exact where the blocks of an evaluator have as many items; else those with one more are scaled like the others.
        """
        total = np.zeros(0)
        for name, difference in differences.items():
            if self._is_whole(name, difference):
                continue
            edges = np.arange(self.blocks + 1) * self.totals[name] // self.blocks
            seen = int(np.searchsorted(edges, len(difference), side="right")) - 1
            weighted = scores[name].weights / self.mean_weights[name] * difference
            sums = np.add.reduceat(weighted[: edges[seen]], edges[:seen]) if seen else np.zeros(0)
            means = sums / np.diff(edges[: seen + 1])
            total = means if not len(total) else total[: len(means)] + means[: len(total)]
        return total


@dataclass(frozen=True, eq=False)
class Race:
    """How far a candidate is scored on the search items.

    Attributes:
        rungs: evaluator -> numbers of items after which a candidate may end; the last is as far as it goes.
        reference: what it is compared with after every rung but the last; None: it is not stopped.
        begin: evaluator -> where its items begin, in the order of the run; empty where every candidate has the first.
    """

    rungs: tuple[Mapping[str, int], ...]
    reference: Opponent | None = field(default=None, repr=False)
    begin: Mapping[str, int] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """Items that are scored at most."""
        return sum(self.rungs[-1].values())

    @property
    def chosen_items(self) -> str:
        """The most items that are scored, as begin and size per evaluator: equal for races on the same items."""
        return " ".join(f"{name} {self.begin.get(name, 0)}+{size}" for name, size in sorted(self.rungs[-1].items()))

    def chosen(self, evaluator: str, order: Sequence[str]) -> Sequence[str]:
        """The items of an evaluator from which the rungs are taken, from all in the order of the run."""
        return order[self.begin.get(evaluator, 0) :]

    def stops(self, rung: int, scores: Mapping[str, Scores]) -> bool:
        """Whether a candidate ends after a rung although there are more."""
        return self.reference is not None and rung < len(self.rungs) - 1 and self.reference.loses(scores)

    def rung_of(self, sizes: Mapping[str, int]) -> int | None:
        """The rung that has these numbers of items; None if none has."""
        return next((index for index, rung in enumerate(self.rungs) if dict(rung) == dict(sizes)), None)

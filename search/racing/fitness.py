"""The fitness of a search that scores candidates on parts of the items.

Everything here is a function of what was asked and told, in that order, so a history replays through a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator, Scores
from search.estimation.stratum import Estimated, Stratum
from search.objective import Objective
from search.racing.config import FitnessConfig
from search.racing.ladder import Ladder, item_order
from search.racing.levels import Levels, Seen
from search.racing.race import Race, Reference

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

Role = Literal["baseline", "step", "parent", "searched"]
"""What a candidate is: of generation 0, an attempt by which one of generation 0 decides, a parent, or of the
optimiser."""

CAUTION = 1.0
"""A candidate is as good as its estimate and so many standard errors, where the best is looked for."""
_SCALE = 2.0
"""The tests are tuned to differences of so many standard errors on the first rung."""
_ROUGHLY = 1e-3
"""Losses of stopped candidates that would be better than their reference are told within about so much of it."""


@dataclass(frozen=True, eq=False)
class Best:
    """A candidate that others may be compared with: cautious loss, loss, and its scores in the order of the run."""

    cautious: float
    loss: float
    scores: Mapping[str, Matrix]


@dataclass(frozen=True, eq=False)
class Standing:
    """How a candidate stands among the others, once the objective is normalised.

    Attributes:
        candidate: its id.
        loss: what the optimiser is told of it.
        losses: normalised loss of every term; only a front needs them.
        scores: on the items that it was scored on; empty where none are recorded.
        searched: whether the optimiser asked for it, and it keeps the constraints.
        may_lead: whether others may be compared with it: it keeps the constraints and was not stopped.
    """

    candidate: int
    loss: float
    losses: Sequence[float]
    scores: Mapping[str, Scores]
    searched: bool
    may_lead: bool


class Fitness:
    """Decides how far candidates are scored, and estimates what they would have on all items.

    Args:
        config: `search.fitness`, with racing.
        evaluators: name -> evaluator; all are scored on the same share of their items.
        seed: seed of the run.
        window: candidates in flight.
    """

    def __init__(self, config: FitnessConfig, evaluators: Mapping[str, Evaluator], seed: int, window: int) -> None:
        self._config = config
        self._orders = {name: item_order(seed, name, tuple(one.items("search"))) for name, one in evaluators.items()}
        self._places: dict[tuple[str, tuple[str, ...]], NDArray[np.intp]] = {}
        self._meanings = {
            name: {metric: meaning for metric, meaning in one.metrics.items() if meaning.per_item}
            for name, one in evaluators.items()
        }
        self.ladder = Ladder.of({name: len(order) for name, order in self._orders.items()}, config)
        self._strata = {name: Stratum(total, config.estimate) for name, total in self.ladder.totals.items()}
        self._levels = Levels(self.ladder, config.precision, window)
        self._best: Best | None = None
        self._reference: Reference | None = None
        self._errors: dict[int, float] = {}
        self._learned = 0
        self._estimated: dict[str, tuple[Scores, int, Estimated]] = {}

    @property
    def parts(self) -> int:
        """Into how many parts the items are cut, each of which is enough for a candidate."""
        return 1

    @property
    def shares_parents(self) -> bool:
        """Whether parts are enough for parents too; the base, which has all items, then comes first."""
        return False

    def losses_of_parts(
        self, objective: Objective, metrics: Mapping[str, float], scores: Mapping[str, Scores]
    ) -> dict[int, float]:
        """Part -> what a candidate lost there; see `Result.parts`."""
        return {}

    @property
    def next_items(self) -> int:
        """Items that the next candidate of the optimiser is scored on at most."""
        return sum(self.ladder.sizes(self._levels.rung).values())

    def race(self, objective: Objective, whole: bool, role: Role = "searched") -> Race:
        """How far a candidate that is asked for now is scored; `whole`: on all items, whatever it has on some."""
        # All of them, also where it cannot be stopped: what is scored together decides over the last bits of scores.
        top = len(self.ladder.rungs) - 1 if whole else self._levels.rung
        rungs = tuple(self.ladder.sizes(rung) for rung in range(top + 1))
        if whole or len(rungs) < 2 or objective.needs_parents or self._best is None:
            return Race(rungs)
        if self._reference is None:
            self._reference = self.reference_of(self._best, coefficients_of(objective))
        return Race(rungs, self._reference)

    def estimated(self, metrics: Mapping[str, float], scores: Mapping[str, Scores]) -> Mapping[str, float]:
        """Metrics of all items; those of a candidate that was scored on all are left as they are.

        A metric without values per item stays the aggregate of the items seen.
        """
        if not scores or self.is_whole(scores):
            return metrics
        found = dict(metrics)
        for name, block in scores.items():
            values = self._estimate(name, block).values
            for (metric, meaning), value in zip(self._meanings[name].items(), values, strict=True):
                low = -math.inf if meaning.low is None else meaning.low
                high = math.inf if meaning.high is None else meaning.high
                found[f"{name}.{metric}"] = min(max(float(value), low), high)
        return found

    def is_whole(self, scores: Mapping[str, Scores]) -> bool:
        """Whether these are the scores of all items."""
        return all(len(block.items) == self.ladder.totals[name] for name, block in scores.items())

    def learn(self, scores: Mapping[str, Scores], parent: bool) -> None:
        """Take note of what a candidate did on the items, in the order of the history; `parent`: or the base."""
        if scores and self.is_whole(scores):
            self._learned += 1
            for name, block in scores.items():
                self._strata[name].learn(*self._in_order(name, block), parent)

    def rank(self, objective: Objective, standing: Standing) -> None:
        """Take note of how a candidate stands, in the order of the history."""
        if not standing.scores:
            return
        loss = standing.loss
        residuals, error = self._residuals(standing.scores, coefficients_of(objective))
        self._errors[standing.candidate] = error
        if standing.searched:
            self._levels.told(Seen(loss, residuals))
        if standing.may_lead and (self._best is None or loss + CAUTION * error < self._best.cautious):
            self._best = self.best_of(loss + CAUTION * error, loss, standing.scores)
            self._reference = None

    def best_of(self, cautious: float, loss: float, scores: Mapping[str, Scores]) -> Best:
        """A candidate with its scores in the order of the run."""
        return Best(cautious, loss, {name: self._in_order(name, block)[0] for name, block in scores.items()})

    def cautious(self, candidate: int, loss: float) -> float:
        """The loss of a candidate and its standard error, which is 0 where all items were scored."""
        return loss + CAUTION * self._errors.get(candidate, 0.0)

    def _residuals(
        self, scores: Mapping[str, Scores], coefficients: Mapping[str, Mapping[str, float]]
    ) -> tuple[list[Vector], float]:
        """What is left unexplained of the objective, one row per evaluator, and the standard error of the estimate."""
        rows, variance = [], 0.0
        for name, block in scores.items():
            weights = self._in_order(name, block)[1]
            factors = np.array([coefficients.get(name, {}).get(metric, 0.0) for metric in self._meanings[name]])
            residuals = self._estimate(name, block).residuals
            row = residuals @ factors if factors.any() else np.zeros(len(residuals))
            row = row * weights / (weights.mean() or 1.0)
            rows.append(row)
            variance += (1 - len(row) / self.ladder.totals[name]) * float(np.var(row)) / max(len(row) - 1, 1)
        return rows, math.sqrt(variance)

    def _estimate(self, name: str, block: Scores) -> Estimated:
        """The estimate of one evaluator, made once although every candidate needs it twice, unless more was learned."""
        known = self._estimated.get(name)
        if known is not None and known[0] is block and known[1] == self._learned:
            return known[2]
        found = self._strata[name].estimate(*self._in_order(name, block), self._begin(name, block))
        self._estimated[name] = block, self._learned, found
        return found

    def reference_of(self, best: Best, coefficients: Mapping[str, Mapping[str, float]]) -> Reference:
        """What others are compared with in a sum of scores with these coefficients, see `coefficients_of`."""
        influence, mean_weights, low, variance = {}, {}, 0.0, 0.0
        for name, factors in coefficients.items():
            row = self._row(name, best.scores[name], factors)
            influence[name] = row
            weights = self._strata[name].weights
            weights = np.ones(self.ladder.totals[name]) if weights is None else weights
            mean_weights[name] = float(weights.mean()) or 1.0
            first = self.ladder.sizes(0)[name]
            if first == self.ladder.totals[name]:
                continue  # known from the start
            low -= self._range(name, factors) * float(weights.max()) / mean_weights[name]
            variance += float(np.var(row)) / first
        return Reference(
            best.loss,
            coefficients,
            influence,
            mean_weights,
            self.ladder.blocks,
            {name: self.ladder.totals[name] for name in coefficients},
            low if math.isfinite(low) and low < 0 else None,
            _SCALE * math.sqrt(variance) or 1.0,
            1 - self._config.confidence,
        )

    def _row(self, name: str, matrix: Matrix, factors: Mapping[str, float]) -> Vector:
        return np.asarray(matrix @ np.array([factors.get(metric, 0.0) for metric in self._meanings[name]]), np.float64)

    def _range(self, name: str, factors: Mapping[str, float]) -> float:
        """How much the influence of one item can differ between two candidates."""
        widths = [
            abs(factor) * (meaning.high - meaning.low)
            if (meaning := self._meanings[name][metric]).low is not None and meaning.high is not None
            else math.inf
            for metric, factor in factors.items()
        ]
        return sum(widths)

    def _begin(self, name: str, block: Scores) -> int:
        """Where the items that were seen begin, in the order of the run."""
        return 0

    def _in_order(self, name: str, block: Scores) -> tuple[Matrix, Vector]:
        """Scores as (n_seen, n_metrics), and weights, in the order of the run."""
        key = name, block.items
        places = self._places.get(key)
        if places is None:
            position = {item: index for index, item in enumerate(self._orders[name])}
            places = np.argsort(np.array([position[item] for item in block.items], np.intp))
            if len(self._places) > 4 * len(self.ladder.rungs) * len(self._orders):
                self._places.clear()
            self._places[key] = places
        matrix = np.column_stack(
            [block.values[metric] for metric in self._meanings[name]] or [np.zeros((len(places), 0))]
        )
        return matrix[places], block.weights[places]


def coefficients_of(objective: Objective) -> dict[str, dict[str, float]]:
    """Evaluator -> metric -> by how much the objective grows with that metric."""
    total = sum(term.weight for term in objective.terms)
    found: dict[str, dict[str, float]] = {}
    for term in objective.terms:
        evaluator, _, metric = term.metric.partition(".")
        factors = found.setdefault(evaluator, {})
        factors[metric] = factors.get(metric, 0.0) + term.weight * term.sign / term.scale / total
    return found


def censored_loss(loss: float, reference: float) -> float:
    """What is told of a stopped candidate: never better than what it lost to, and in the order of estimates."""
    width = _ROUGHLY * (1 + abs(reference))
    beyond = (loss - reference) / width
    return reference + width * (beyond + math.log1p(math.exp(-beyond)) if beyond > 0 else math.log1p(math.exp(beyond)))

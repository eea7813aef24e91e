"""From metrics to one number: weighted, normalised against the parents, with constraints.

The loss is always finite and smaller is better, because that is all an optimiser can be trusted with:
feasible candidates rank by the objective, infeasible ones behind them by how much they violate, failed
ones last. nevergrad's own handling of constraints and of NaN does not work for most of its optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaluators.base import Metric
from search.config import Constraint, ObjectivesConfig

FAILED_LOSS = 2e9
"""Loss of a candidate without usable metrics: behind every other one."""

INFEASIBLE_LOSS = 1e9
"""Added to the violation of an infeasible candidate: behind every feasible one."""

LARGEST_OBJECTIVE = 1e8


@dataclass(frozen=True)
class Term:
    """One metric of the objective.

    Attributes:
        sign: +1 for a metric that is minimised, -1 for one that is maximised.
        best, scale: value and width that normalise it: (value - best) / scale, in the metric's unit.
    """

    metric: str
    weight: float
    sign: int
    best: float = 0.0
    scale: float = 1.0

    def loss(self, value: float) -> float:
        return self.sign * (value - self.best) / self.scale


@dataclass(frozen=True)
class Judgement:
    """What the optimiser is told of a candidate."""

    loss: float
    feasible: bool


@dataclass(frozen=True)
class Objective:
    """A weighted mean of metrics under constraints.

    Attributes:
        pareto: whether the front of the terms is searched, and not only the best mean.
        pick: what chooses from that front, see `search.pareto.pick`.
    """

    terms: tuple[Term, ...]
    constraints: tuple[Constraint, ...]
    needs_parents: bool
    pareto: bool = False
    pick: str = "knee"

    def against(self, parents: Sequence[Mapping[str, float]]) -> Objective:
        """This objective normalised so that, per metric, the best parent is 0 and the worst is 1.

        Args:
            parents: metrics of the parents that could be evaluated, at least one. Where they agree on
                a metric its magnitude is the scale, so that no term is divided by zero.
        """
        if not self.needs_parents:
            return self
        terms = []
        for term in self.terms:
            losses = [term.sign * parent[term.metric] for parent in parents]
            width = max(losses) - min(losses)
            scale = width if width > 0 else (abs(losses[0]) or 1.0)
            terms.append(Term(term.metric, term.weight, term.sign, term.sign * min(losses), scale))
        return replace(self, terms=tuple(terms), needs_parents=False)

    def value(self, metrics: Mapping[str, float]) -> float:
        """The weighted mean of the normalised terms; smaller is better, NaN if a metric is."""
        total = sum(term.weight for term in self.terms)
        return sum(term.weight * term.loss(metrics[term.metric]) for term in self.terms) / total

    def losses(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The normalised loss of every term, smaller is better."""
        return tuple(term.loss(metrics[term.metric]) for term in self.terms)

    def violation(self, metrics: Mapping[str, float]) -> float:
        """Sum over the constraints of how far the metric is beyond its bound, relative to the bound."""
        total = 0.0
        for constraint in self.constraints:
            sign = 1 if constraint.relation == "<=" else -1
            beyond = sign * (metrics[constraint.metric] - constraint.bound)
            total += max(beyond, 0.0) / (abs(constraint.bound) or 1.0)
        return total

    def feasible(self, metrics: Mapping[str, float] | None) -> bool:
        """Whether all constraints are kept; needs no normalisation."""
        return metrics is not None and self.violation(metrics) == 0

    def judge(self, metrics: Mapping[str, float] | None) -> Judgement:
        """The finite loss of a candidate; `None` stands for a failed evaluation."""
        if metrics is None:
            return Judgement(FAILED_LOSS, False)
        value, violation = self.value(metrics), self.violation(metrics)
        if not (math.isfinite(value) and math.isfinite(violation)):
            return Judgement(FAILED_LOSS, False)
        if violation > 0:
            return Judgement(INFEASIBLE_LOSS + min(violation, LARGEST_OBJECTIVE), False)
        return Judgement(min(value, LARGEST_OBJECTIVE), True)


def make_objective(
    config: ObjectivesConfig, constraints: Sequence[Constraint], metrics: Mapping[str, Metric]
) -> Objective:
    """The objective of a config; every metric it names must be in `metrics`."""
    terms = tuple(
        Term(term.metric, term.weight, 1 if metrics[term.metric].direction == "minimize" else -1)
        for term in config.terms
    )
    return Objective(
        terms, tuple(constraints), config.normalize == "parents", pareto=config.search == "pareto", pick=config.pick
    )

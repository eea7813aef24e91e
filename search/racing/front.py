"""Racing where a front is searched: whoever is not stopped is scored on all items, so the front is exact.

A candidate may have a bad mean and still be on the front, so it is stopped only when a member of the front is better in
every term, beyond chance. For one member that is an intersection-union test (Berger 1982, Multiparameter hypothesis
testing and acceptance sampling, Technometrics 24): each term is tested at the full level, and all must be significant.
Over the members the levels add up (union bound). A candidate that none of these members dominates is therefore stopped
with a probability of at most 1 - `confidence`, however often that is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evaluators.base import Evaluator, Scores
from search.objective import Objective, Term
from search.pareto.dominance import front, spread
from search.racing.config import FitnessConfig
from search.racing.fitness import Best, Fitness, Role, Standing
from search.racing.race import Race, Reference

MOST_MEMBERS = 16
"""Members of the front that candidates are compared with, those that are spread best. The more there are, the nearer is
one that may dominate, but the union bound demands more evidence of each, and all of them go to the workers. On 389
candidates of `examples/front.yaml` 4, 8, 16 and 64 of them saved 7, 15, 23 and 26 % of the items."""


@dataclass(frozen=True, eq=False)
class Member:
    """A member of the front, term by term.

    Attributes:
        loss: its weighted mean.
        terms: the comparison of each term alone.
    """

    loss: float
    terms: tuple[Reference, ...]

    def dominates(self, scores: Mapping[str, Scores], limit: float) -> bool:
        """Whether the evidence of every term that a candidate with these scores is worse reaches `limit`, a logarithm;
        of terms whose items were all scored, whether it is not better, and worse in one of all."""
        strictly = False
        for term in self.terms:
            known = term.known_difference(scores)
            if known is None:
                if term.log_evidence(scores) < limit:
                    return False
            elif known < 0:
                return False
            strictly |= known is None or known > 0
        return strictly


@dataclass(frozen=True, eq=False)
class FrontReference:
    """Members of the front that others are compared with.

    Attributes:
        alpha: probability of stopping a candidate that none of them dominates.
    """

    members: tuple[Member, ...]
    alpha: float

    @property
    def loss(self) -> float:
        """That of the best: it is not known here which member stopped a candidate, and none has a better mean."""
        return min(member.loss for member in self.members)

    def loses(self, scores: Mapping[str, Scores]) -> bool:
        """Whether a member of the front is better in every term, beyond chance."""
        limit = math.log(len(self.members) / self.alpha)
        return any(member.dominates(scores, limit) for member in self.members)


@dataclass(frozen=True, eq=False)
class _Known:
    losses: tuple[float, ...]
    best: Best


class FrontFitness(Fitness):
    """Scores candidates on all items, part by part, unless the front dominates them; see `Fitness`."""

    def __init__(self, config: FitnessConfig, evaluators: Mapping[str, Evaluator], seed: int, window: int) -> None:
        super().__init__(config, evaluators, seed, window)
        self._members: list[_Known] = []
        self._opponents: FrontReference | None = None
        self._alpha = 1 - config.confidence

    @property
    def next_items(self) -> int:
        return sum(self.ladder.totals.values())

    def race(self, objective: Objective, whole: bool, role: Role = "searched") -> Race:
        rungs = tuple(self.ladder.sizes(rung) for rung in range(len(self.ladder.rungs)))
        if whole or len(rungs) < 2 or objective.needs_parents or not self._members:
            return Race(rungs)
        if self._opponents is None:
            losses = np.array([known.losses for known in self._members])
            chosen = [self._members[index].best for index in spread(losses, MOST_MEMBERS)]
            self._opponents = FrontReference(tuple(self._member(best, objective) for best in chosen), self._alpha)
        return Race(rungs, self._opponents)

    def rank(self, objective: Objective, standing: Standing) -> None:
        if not (standing.scores and standing.may_lead and self.is_whole(standing.scores)):
            return
        best = self.best_of(standing.loss, standing.loss, standing.scores)
        every = [*self._members, _Known(tuple(standing.losses), best)]
        kept = [every[index] for index in sorted(front(np.array([known.losses for known in every])))]
        if len(kept) != len(self._members) or kept[-1] is every[-1]:
            self._members, self._opponents = kept, None

    def _member(self, best: Best, objective: Objective) -> Member:
        return Member(best.loss, tuple(self.reference_of(best, coefficients_of_term(term)) for term in objective.terms))


def coefficients_of_term(term: Term) -> dict[str, dict[str, float]]:
    """Evaluator -> metric -> by how much the loss of a term grows with that metric."""
    evaluator, _, metric = term.metric.partition(".")
    return {evaluator: {metric: term.sign / term.scale}}

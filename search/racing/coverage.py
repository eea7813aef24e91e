"""A run's book of items: on which each candidate is scored, what that costs, what is made of the scores of some.

Everything here is a function of what was asked and told, in that order, so a history replays through a fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from evaluators.base import Scores
from search.candidate import Candidate
from search.objective import Judgement, Objective
from search.pool import Outcome
from search.racing.fitness import Fitness, Role, Standing, censored_loss
from search.racing.race import Race


@dataclass(frozen=True, eq=False)
class _Told:
    """A result that waits to be ranked."""

    candidate: Candidate
    metrics: Mapping[str, float]
    scores: Mapping[str, Scores]
    censored: bool


class Coverage:
    """Which of the search items the candidates of a run have.

    Args:
        fitness: decides that, and estimates the rest; None: all candidates are scored on all items.
    """

    def __init__(self, fitness: Fitness | None) -> None:
        self._fitness = fitness
        self._races: dict[str, Race] = {}
        self._race_of: dict[int, Race] = {}
        self._spent = 0
        self._first_asked: set[int] = set()
        self._unranked: list[_Told] = []

    @property
    def parts(self) -> int:
        """Into how many parts the items are cut, each of which is enough for a candidate."""
        return 1 if self._fitness is None else self._fitness.parts

    @property
    def rotates(self) -> bool:
        """Whether candidates are scored on different parts of the items."""
        return self.parts > 1

    @property
    def shares_parents(self) -> bool:
        """Whether parts are enough for parents too; the base, which has all items, then comes first."""
        return self._fitness is not None and self._fitness.shares_parents

    @property
    def items_spent(self) -> tuple[int, int] | None:
        """Search items scored, with the most that those in flight take, and the most that one more takes.

        None where every candidate is scored on all items.
        """
        return None if self._fitness is None else (self._spent, self._fitness.next_items)

    def assigned(self, candidate: Candidate, objective: Objective, *, whole: bool) -> Candidate:
        """A candidate that is asked for now, and how far it is scored; a recipe that was there before has the race, and
        the result, of the first.

        Args:
            whole: whether it must be scored on all items.
        """
        if self._fitness is None:
            return candidate
        race = self._races.get(candidate.work)
        if race is None:
            race = self._fitness.race(objective, whole, _role(candidate))
        asked = replace(candidate, race=race)
        self._race_of[asked.id] = race
        if asked.work not in self._races:
            self._races[asked.work] = race
            self._spent += race.items
            self._first_asked.add(asked.id)
        return asked

    def tell(
        self,
        asked: Candidate,
        objective: Objective,
        metrics: Mapping[str, float] | None,
        scores: Mapping[str, Scores],
        *,
        censored: bool,
        parent: bool,
    ) -> None:
        """Take note of a result, in the order of the history.

        Args:
            metrics: None for a failure.
            censored: whether it was stopped early.
            parent: whether it is a parent or the base.
        """
        if self._fitness is None:
            return
        if scores and asked.race is not None and asked.id in self._first_asked:
            self._spent += sum(len(block.items) for block in scores.values()) - asked.race.items
        self._fitness.learn(scores, parent)
        if metrics is not None:
            self._unranked.append(_Told(asked, metrics, scores, censored))
        if objective.needs_parents:
            return
        for one in self._unranked:
            self._fitness.rank(objective, _standing(one, objective))
        self._unranked.clear()

    def completed(self, outcome: Outcome) -> Outcome:
        """A result on the search items with the metrics of all of them, estimated where only some were scored."""
        if self._fitness is None or outcome.failure is not None:
            return outcome
        return replace(outcome, metrics=self._fitness.estimated(outcome.metrics, outcome.scores))

    def scored(self, outcome: Outcome) -> int | None:
        """How many search items were scored, at most for a failure; None where all may have been."""
        race = self._race_of.get(outcome.candidate)
        if self._fitness is None or race is None or outcome.items != "search":
            return None
        # Nobody knows how far a failed one came.
        count = sum(len(block.items) for block in outcome.scores.values()) if outcome.scores else race.items
        return None if count == sum(self._fitness.ladder.totals.values()) else count

    def losses_of_parts(
        self, objective: Objective, metrics: Mapping[str, float], scores: Mapping[str, Scores]
    ) -> dict[int, float]:
        """Part -> what a candidate lost there; see `Result.parts`."""
        return {} if self._fitness is None else self._fitness.losses_of_parts(objective, metrics, scores)

    def cautious(self, candidate: int, loss: float) -> float:
        """A loss, and beside it what may be wrong with it because not all items were scored."""
        return loss if self._fitness is None else self._fitness.cautious(candidate, loss)


def judged(objective: Objective, metrics: Mapping[str, float] | None, censored: Candidate | None) -> Judgement:
    """Loss and feasibility, once the objective is normalised.

    Args:
        metrics: None for a failure.
        censored: the candidate, if it was stopped: its loss is then that of one no better than what it lost to.
    """
    judgement = objective.judge(metrics)
    reference = censored.race.reference if censored is not None and censored.race is not None else None
    if reference is None or not judgement.feasible:
        return judgement
    return replace(judgement, loss=censored_loss(judgement.loss, reference.loss))


def _standing(told: _Told, objective: Objective) -> Standing:
    candidate = told.candidate
    judgement = judged(objective, told.metrics, candidate if told.censored else None)
    return Standing(
        candidate.id,
        judgement.loss,
        objective.losses(told.metrics),
        told.scores,
        searched=candidate.genome is not None and judgement.feasible,
        may_lead=judgement.feasible and not told.censored,
    )


def _role(candidate: Candidate) -> Role:
    if candidate.genome is not None:
        return "searched"
    return "parent" if candidate.is_parent else "step" if candidate.step else "baseline"

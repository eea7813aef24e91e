"""The front of a run from what is recorded: how it stands, and the trial that an expression picks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluators.base import ItemPool, Metric
from search.candidate import Candidate
from search.config import Constraint, ObjectivesConfig
from search.errors import UserError
from search.objective import Objective, Term, make_objective
from search.pareto.front import Front, FrontTracker, front_of
from search.pareto.pick import Pick, choose, parse_pick, resolve, values
from search.store.events import Trial


def tracked_front(
    manifest: Mapping[str, Any], trials: Iterable[Trial], origins: Mapping[int, str]
) -> FrontTracker | None:
    """The front on the search items as a run has it; None where it searches none.

    Args:
        manifest: `run.yaml`.
        trials: in the order of the history.
        origins: candidate -> origin.
    """
    config = manifest["config"]
    if config.get("objectives", {}).get("search") != "pareto":  # runs of earlier versions do not say
        return None
    objectives = ObjectivesConfig.model_validate(config["objectives"])
    metrics = {name: Metric(direction) for name, direction in manifest["directions"].items()}
    constraints = [Constraint.model_validate(constraint) for constraint in config.get("constraints", ())]
    found = FrontTracker(make_objective(objectives, constraints, metrics), len(config["models"]["sources"]))
    for trial in trials:
        found.note(trial, origins.get(trial.candidate, ""))
    return found


@dataclass(frozen=True)
class Picked:
    """A trial that an expression chose.

    Attributes:
        candidate: its number.
        sentence: which one it is, what it has, and on which items.
    """

    candidate: int
    sentence: str


def pick_trial(
    text: str,
    trials: Iterable[Trial],
    objective: Objective,
    metrics: Mapping[str, Metric],
    candidates: Sequence[Candidate],
) -> Picked:
    """Choose from the front on the most trusted items there are: select items, or search items before the finals.

    Metrics that the expression names count as terms of the front beside those of the objective.

    Raises:
        UserError: no expression, metrics that nobody gives, no front yet, or nothing that keeps the bounds.
    """
    pick = resolve(parse_pick(text), metrics)
    if objective.needs_parents:
        raise UserError("the parents are not all evaluated yet, so there is no front to pick from")
    objective = _with_picked(objective, pick, metrics)
    origins = {candidate.id: candidate.origin for candidate in candidates}
    known = list(trials)
    items: ItemPool = "select" if any(trial.items == "select" for trial in known) else "search"
    front = front_of(known, objective, origins, items)
    try:
        point = choose(front, pick)
    except UserError as error:
        if items == "search":
            raise
        raise UserError(f"{error}{_on_search_items(front_of(known, objective, origins, 'search'), pick)}") from error
    names = [*(bound.metric for bound in pick.bounds), *([pick.metric] if pick.metric else front.metrics)]
    sentence = (
        f"picked trial {point.candidate} ({point.origin}) of {len(front.points)} on the front: "
        f"{values(point.metrics, names)} on {_seen(known, point.candidate, items)}"
    )
    return Picked(point.candidate, sentence)


def _seen(trials: Iterable[Trial], candidate: int, items: ItemPool) -> str:
    """What the metrics of a candidate are of."""
    scored = next(trial.scored for trial in trials if trial.candidate == candidate and trial.items == items)
    return f"the {items} items" + ("" if scored is None else f", estimated from {scored} of them")


def _on_search_items(front: Front, pick: Pick) -> str:
    """Which trial would do there: only the finalists were scored on the select items."""
    try:
        point = choose(front, pick)
    except UserError:
        return ""
    return f"; on the search items alone trial {point.candidate} does: --trial {point.candidate}"


def _with_picked(objective: Objective, pick: Pick, metrics: Mapping[str, Metric]) -> Objective:
    """The objective with a term for every metric that is picked by and is none yet; their weight is not looked at."""
    terms = {term.metric: term for term in objective.terms}
    for name in (*(bound.metric for bound in pick.bounds), *([pick.metric] if pick.metric else ())):
        sign = 1 if metrics[name].direction == "minimize" else -1
        terms.setdefault(name, Term(name, 1.0, sign))
    return replace(objective, terms=tuple(terms.values()))

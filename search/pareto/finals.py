"""The end of a search for a front: who is scored again, which point is chosen, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.candidate import SEARCHED, Candidate
from search.errors import UserError
from search.objective import Objective
from search.pareto.dominance import front, spread
from search.pareto.front import Front, feasible_points, front_of, losses_of
from search.pareto.pick import choose, parse_pick, resolve

if TYPE_CHECKING:
    from search.driver import Driver
    from search.store.events import Trial
    from search.verdict import Row


@dataclass(frozen=True)
class Chosen:
    """A point of the front on the select items.

    Attributes:
        candidate: which one.
        how: a sentence on how it was chosen.
    """

    candidate: Candidate
    how: str


def front_finalists(driver: Driver, count: int) -> list[Candidate]:
    """The front of the searched candidates on the search items, each recipe once; where that has more than `count`
    points, those that are spread best."""
    known = driver.population.candidates
    objective = driver.population.objective
    points = [
        point
        for point in feasible_points(driver.trials.values(), objective, origins_of(known), "search")
        if point.origin == SEARCHED
    ]
    losses = losses_of(points, len(objective.terms))
    distinct: dict[str, int] = {}
    for index in front(losses):
        distinct.setdefault(known[points[index].candidate].recipe_hash, index)
    kept = list(distinct.values())
    return [known[points[kept[index]].candidate] for index in spread(losses[kept], count)]


def choose_from_front(driver: Driver, selected: Mapping[int, Trial]) -> Chosen | None:
    """The point that `objectives.pick` means, on the front of what was scored on the select items, baselines included;
    None if nothing is feasible. Where no point keeps the bounds, the knee is chosen and the sentence says so."""
    candidates, objective = driver.population.candidates, driver.population.objective
    found = front_of(selected.values(), objective, origins_of(candidates), "select")
    if not found.points:
        return None
    metrics = {name for point in found.points for name in point.metrics}
    try:
        point = choose(found, resolve(parse_pick(objective.pick), sorted(metrics)))
        how = f"Chosen as {'the knee' if objective.pick == 'knee' else repr(objective.pick)}"
    except UserError as error:
        point = choose(found, parse_pick("knee"))
        how = f"{str(error)[0].upper()}{str(error)[1:]}. Chosen instead as the knee"
    where = f"of the {len(found.points)} point(s) on the front of the select items"
    return Chosen(candidates[point.candidate], f"{how} {where}.")


def front_sentence(objective: Objective, rows: Sequence[Row], winner: int, how: str) -> str:
    """What the certify items say of the chosen point, term by term: the table compares weighted means only."""
    own = next(row for row in rows if row.candidate == winner and not row.arm)
    others = [row for row in rows if row is not own and row.feasible]
    ours, theirs = objective.losses(own.metrics), [objective.losses(row.metrics) for row in others]
    above = [row.label for row, losses in zip(others, theirs, strict=True) if _dominates(losses, ours)]
    below = sum(_dominates(ours, losses) for losses in theirs)
    if above:
        stands = f"it is dominated by {', '.join(above)}: no better in any term, and worse in at least one"
    else:
        stands = f"nothing that it is compared with dominates it, and it dominates {below} of {len(others)}"
    terms = []
    for index, term in enumerate(objective.terms):
        text = f"{term.metric} {own.metrics[term.metric]:.4f}"
        if others:
            best = min(range(len(others)), key=lambda row: theirs[row][index])
            text += f" (best of the others {others[best].metrics[term.metric]:.4f}, {others[best].label})"
        terms.append(text)
    return f"{how} On the certify items {stands}. Term by term: {'; '.join(terms)}."


def final_fronts(driver: Driver) -> tuple[Front, Front]:
    """The front on the search items, and that on the select items."""
    objective, origins = driver.population.objective, origins_of(driver.population.candidates)
    trials = list(driver.trials.values())
    return front_of(trials, objective, origins, "search"), front_of(trials, objective, origins, "select")


def origins_of(candidates: Sequence[Candidate]) -> dict[int, str]:
    """Candidate -> origin."""
    return {candidate.id: candidate.origin for candidate in candidates}


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

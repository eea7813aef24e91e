"""A driver whose candidates are scored on parts of the items: the same history however it was run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import driving
import pytest
from landscape import SOURCES, population
from racing_landscape import ITEMS, SEED, TABLE, WINDOW, Racing

from search.budget import Budget, Spending, Used, limit_in_force
from search.driver import Limits
from search.errors import RunError
from search.pool import Failure, Job, Outcome
from search.racing.config import FitnessConfig
from search.racing.kinds import make_fitness
from search.replay import replay_ordered
from search.store.events import Ask, Event, Extended, Trial
from search.store.sessions import Sessions


def drive(
    folder: Path,
    pool: Racing,
    *,
    budget: int = 90,
    ordered: bool = True,
    stop_after: int | None = None,
    most_items: int | None = None,
    fitness: dict[str, Any] | None = None,
    normalize: str = "none",
    extended: bool = False,
) -> list[Event]:
    config = FitnessConfig.model_validate(fitness or {"rotate": True})
    made = make_fitness(config, {"e": TABLE}, SEED, WINDOW, front=False)
    return driving.search_in(
        folder,
        pool,
        population(100, WINDOW, normalize, "gaussian_process", fitness=made),
        Limits(budget, WINDOW, ordered),
        spending=Spending(Budget(budget, most_items), ITEMS),
        extended_to=Budget(budget, most_items) if extended else None,
        stop_after=stop_after,
    )


def content(events: Sequence[Event]) -> list[object]:
    return driving.content(event for event in events if not isinstance(event, Extended))


def searched(events: Sequence[Event]) -> list[Trial]:
    origins = {event.candidate: event.origin for event in events if isinstance(event, Ask)}
    return [event for event in events if isinstance(event, Trial) and origins[event.candidate] == "search"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return drive(tmp_path_factory.mktemp("whole"), Racing(1, 0))


def test_the_history_is_the_same_after_every_stop_with_failures_on_any_number_of_workers(
    whole: list[Event], tmp_path: Path
) -> None:
    assert any(trial.scored is None and not trial.failure_kind for trial in searched(whole))
    for number, stop_after in enumerate((20, 61, 98)):
        folder = tmp_path / str(number)
        drive(folder, Racing(3, number), stop_after=stop_after)
        assert content(drive(folder, Racing(4, 50 + number))) == content(whole)


def test_the_base_comes_first_and_parents_have_a_share_of_the_items(whole: list[Event]) -> None:
    first, *parents = [event for event in whole if isinstance(event, Ask)][:4]
    assert [first.origin, *(ask.origin for ask in parents)] == ["base", "parent:a", "parent:b", "parent:c"]
    scored = {event.candidate: event.scored for event in whole if isinstance(event, Trial)}
    assert scored[first.candidate] is None
    assert {scored[ask.candidate] for ask in parents} == {0.3 * ITEMS}


@pytest.mark.parametrize("ordered", [True, False])
def test_that_no_parent_can_be_evaluated_is_said_with_the_reason(tmp_path: Path, ordered: bool) -> None:
    class NoParents(Racing):
        def _counted(self, job: Job) -> Outcome:
            (parent, *others) = job.recipe.rules[0].sources
            if parent in SOURCES and not others:
                return Outcome(job.candidate, job.items, failure=Failure("error", f"{parent} is broken"))
            return super()._counted(job)

    with pytest.raises(RunError, match=r"no parent could be evaluated.*: a is broken"):
        drive(tmp_path, NoParents(3, 1), ordered=ordered)


def test_what_is_expected_is_in_the_unit_of_the_loss(tmp_path: Path) -> None:
    fitness = {"rotate": True, "parents": 1}
    whole = drive(tmp_path, Racing(1, 0), fitness=fitness, normalize="parents")
    made = make_fitness(FitnessConfig.model_validate(fitness), {"e": TABLE}, SEED, WINDOW, front=False)
    told = population(100, WINDOW, "parents", "gaussian_process", fitness=made)
    assert not replay_ordered(whole, told, WINDOW)
    complete = {t.candidate: t.loss for t in searched(whole) if t.scored is None and not t.failure_kind}
    assert complete
    for candidate, loss in complete.items():
        assert told.expected(candidate) == pytest.approx(loss, abs=0.02)


def test_an_extended_run_asks_what_one_with_the_larger_budget_asks(whole: list[Event], tmp_path: Path) -> None:
    drive(tmp_path, Racing(2, 5), budget=40)
    drive(tmp_path, Racing(3, 6), budget=63, extended=True)
    found = drive(tmp_path, Racing(1, 7), extended=True)
    assert sorted(map(repr, content(found))) == sorted(map(repr, content(whole)))


def test_a_run_in_order_of_arrival_goes_on_after_stops(tmp_path: Path) -> None:
    first = drive(tmp_path, Racing(3, 1), ordered=False, stop_after=70)
    again = drive(tmp_path, Racing(2, 2), ordered=False, stop_after=50)
    assert content(again)[: len(first)] == content(first)
    found = drive(tmp_path, Racing(2, 3), ordered=False)
    assert sum(isinstance(event, Ask) for event in found) == 90


def test_a_limit_of_items_holds_and_ends_at_the_same_candidate(tmp_path: Path) -> None:
    most_items = 900
    pool = Racing(1, 0)
    one = drive(tmp_path / "one", pool, most_items=most_items, budget=500)
    limit = limit_in_force(one)
    assert limit is not None
    assert pool.items == limit.used <= most_items
    assert pool.items > most_items - 2 * ITEMS
    assert Used.of(one, Sessions(tmp_path / "none"), ITEMS).item_evaluations == pool.items
    assert content(drive(tmp_path / "other", Racing(4, 9), most_items=most_items, budget=500)) == content(one)


def test_racing_stops_candidates_of_an_optimiser_that_could_put_parts_together(tmp_path: Path) -> None:
    found = drive(tmp_path, Racing(2, 0), fitness={"racing": True, "smallest": 6, "precision": 0.04})
    assert any(trial.scored is not None and not trial.failure_kind for trial in searched(found))

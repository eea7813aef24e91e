"""Budgets: what ends a search, that it ends alike on any cluster, and that a run can be extended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from driving import content, search_in
from landscape import SOURCES, Shuffled, population

from evaluators.base import Scores
from search.budget import (
    Budget,
    Spending,
    Used,
    limit_in_force,
    refuse_useless,
    why_ended,
)
from search.driver import Limits
from search.errors import UserError
from search.limits import LimitsConfig, duration, seconds_of
from search.nevergrad_box import paced_by_budget
from search.optimizer import Problem
from search.store.events import Ask, Event, LimitReached, Trial
from search.store.sessions import Session, Sessions

ITEMS = 20
"""Search items of a candidate of the landscape."""
WINDOW = 4


def drive(
    folder: Path,
    pool: Shuffled,
    budget: Budget,
    *,
    extended: bool = False,
    stop_after: int | None = None,
    seconds: Callable[[], float] = lambda: 0.0,
    ordered: bool = True,
) -> list[Event]:
    """Search in `folder` until the budget, after an extension to it, or until `stop_after` more events."""
    return search_in(
        folder,
        pool,
        population(25),  # what the optimiser was made for stays, whatever the budget becomes
        Limits(budget.candidates, WINDOW, ordered),
        spending=Spending(budget, ITEMS, seconds=seconds),
        extended_to=budget if extended else None,
        stop_after=stop_after,
    )


def asks(events: list[Event]) -> list[object]:
    return [event.deterministic() for event in events if isinstance(event, Ask)]


def results(events: list[Event]) -> list[object]:
    return [event.deterministic() for event in events if isinstance(event, Trial)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """A run that had 45 candidates from its start."""
    return drive(tmp_path_factory.mktemp("whole"), Shuffled(1, 0), Budget(45))


@pytest.mark.parametrize("steps", [(25, 45), (25, 26, 31, 45), (12, 45), (44, 45)])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_extended_run_asks_and_finds_what_one_with_the_larger_budget_did(
    steps: tuple[int, ...], workers: int, whole: list[Event], tmp_path: Path
) -> None:
    for step, budget in enumerate(steps):
        events = drive(tmp_path, Shuffled(workers, step), Budget(budget), extended=step > 0)
        assert len(asks(events)) == len(results(events)) == budget
    assert asks(events) == asks(whole)
    assert results(events) == results(whole)


def test_an_extension_that_dies_after_any_event_comes_to_the_same_end(whole: list[Event], tmp_path: Path) -> None:
    for cut in range(0, 42, 3):
        folder = tmp_path / str(cut)
        drive(folder, Shuffled(3, cut), Budget(25))
        drive(folder, Shuffled(3, cut), Budget(45), extended=True, stop_after=cut)
        drive(folder, Shuffled(2, cut), Budget(45), stop_after=7)
        events = drive(folder, Shuffled(4, cut), Budget(45))
        assert asks(events) == asks(whole)
        assert results(events) == results(whole)
        numbers = [event.candidate for event in events if isinstance(event, Trial)]
        assert len(numbers) == len(set(numbers))


def test_a_run_in_order_of_arrival_goes_on_after_an_extension(tmp_path: Path) -> None:
    first = drive(tmp_path, Shuffled(4, 1), Budget(25), ordered=False)
    events = drive(tmp_path, Shuffled(4, 2), Budget(45), ordered=False, extended=True)
    assert content(events)[: len(first)] == content(first)
    assert sorted(event.candidate for event in events if isinstance(event, Trial)) == list(range(45))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_item_evaluations_end_a_search_at_the_same_candidate_on_any_number_of_workers(
    workers: int, whole: list[Event], tmp_path: Path
) -> None:
    events = drive(tmp_path, Shuffled(workers, workers), Budget(45, item_evaluations=30 * ITEMS + 19))
    works = {event.recipe_hash for event in events if isinstance(event, Ask)}
    assert len(works) == 30
    assert len(asks(events)) > 30, "a recipe that was there before costs nothing"
    assert asks(events) == asks(whole)[: len(asks(events))]
    assert len(results(events)) == len(asks(events))
    limit = limit_in_force(events)
    assert limit is not None
    assert (limit.limit, limit.used) == ("item_evaluations", 30 * ITEMS)
    # The limit is met where it would be exceeded: the deterministic part is that of one worker.
    one = drive(tmp_path / "one", Shuffled(1, 0), Budget(45, item_evaluations=30 * ITEMS + 19))
    assert content(events) == content(one)


class Clock:
    """Time that passes by one second whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_limit_by_time_is_recorded_and_holds_when_the_clock_says_otherwise(
    whole: list[Event], tmp_path: Path
) -> None:
    budget = Budget(45, wall_clock=30)
    events = drive(tmp_path, Shuffled(3, 1), budget, seconds=Clock())
    limits = [event for event in events if isinstance(event, LimitReached)]
    assert [limit.limit for limit in limits] == ["wall_clock"]
    assert limits[0].used >= 30
    asked = len(asks(events))
    assert len(SOURCES) < asked < 45
    assert len(results(events)) == asked, "what was in flight is finished"
    assert "limit of wall-clock" in why_ended(asked, limits[0], budget)
    assert f"{asked} of 45 candidates" in why_ended(asked, limits[0], budget)
    assert content(drive(tmp_path, Shuffled(2, 2), budget)) == content(events)
    extended = drive(tmp_path, Shuffled(2, 2), Budget(45), extended=True)
    assert asks(extended) == asks(whole)
    assert results(extended) == results(whole)
    assert "budget of 45 candidates" in why_ended(45, limit_in_force(extended), Budget(45))


def test_a_driver_that_dies_after_the_limit_finishes_what_was_in_flight_and_asks_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.driver.STEPS", 1)  # so that it can die after every event
    budget = Budget(45, wall_clock=30)
    whole = drive(tmp_path / "whole", Shuffled(4, 1), budget, seconds=Clock())
    moment = next(number for number, event in enumerate(whole) if isinstance(event, LimitReached))
    events = drive(tmp_path, Shuffled(4, 1), budget, seconds=Clock(), stop_after=moment + 1)
    assert isinstance(events[-1], LimitReached)
    asked = len(asks(events))
    assert len(results(events)) < asked
    after = drive(tmp_path, Shuffled(1, 1), budget)
    assert len(asks(after)) == len(results(after)) == asked


def test_no_limit_cuts_off_the_parents_and_the_base(tmp_path: Path) -> None:
    events = drive(tmp_path, Shuffled(1, 1), Budget(45, wall_clock=1e-9), seconds=lambda: 1.0)
    origins = [event.origin for event in events if isinstance(event, Ask)]
    assert origins == [*(f"parent:{source}" for source in SOURCES), "base"]


def test_gpu_hours_are_those_of_trials_on_the_workers_that_ran_them(tmp_path: Path) -> None:
    hour = Trial(0, "search", merge_seconds=600.0, evaluate_seconds=3000.0)
    for gpus, hours in ((2.0, 2.0), (0.5, 0.5), (0.0, 1.0)):
        spending = Spending(Budget(None, gpu_hours=hours), gpus_per_worker=gpus)
        assert spending.reached(0) is None
        spending.told(replace(hour, items="certify"))
        assert spending.reached(0) is None, "finals come on top"
        spending.told(replace(hour, merge_seconds=0.0, evaluate_seconds=0.0, attempts=0))  # a copy of another's result
        assert spending.reached(0) is None
        spending.told(hour)
        assert spending.reached(0) == LimitReached("gpu_hours", hours)
        spending = Spending(Budget(None, gpu_hours=hours), gpus_per_worker=gpus)
        spending.told(Trial(0, "search", evaluate_seconds=1800.0, failure_kind="timeout", attempts=2))
        assert spending.reached(0) == LimitReached("gpu_hours", hours), "hung twice for half an hour"
    sessions = Sessions(tmp_path / "sessions.json")
    sessions.all = [
        Session("", "here", 0, "ray", 2, 4.0, "cuda", search_seconds=10.0),
        Session("", "there", 2, "local", 1, 0.0, "cpu", search_seconds=5.0),
    ]
    used = Used.of([Ask(0, "base", None, "a"), hour, hour], sessions, 7)
    assert used == Used(1, 7, 5.0, 15.0)


def test_the_time_of_a_search_is_counted_over_its_drivers(tmp_path: Path) -> None:
    begin = {"pool": "local", "workers": 1, "gpus_per_worker": 0.0, "device": "cpu", "versions": {}}
    before = 0.0
    for driver in range(3):
        sessions = Sessions(tmp_path / "sessions.json")
        assert sessions.search_seconds == before
        sessions.begin(first_event=driver, **begin)  # type: ignore[arg-type]
        with sessions.searching():
            while sessions.search_seconds < before + 0.01:
                sessions.tick()
        before = sessions.search_seconds
        assert before >= 0.01 * (driver + 1)
    assert Sessions(tmp_path / "sessions.json").search_seconds == before


@pytest.mark.parametrize(("name", "paced"), [("TwoPointsDE", False), ("DiscreteBSOOnePlusOne", True)])
def test_an_optimizer_that_paces_itself_by_its_budget_is_known(name: str, paced: bool) -> None:
    """An extended run equals one with the larger budget only where it does not."""
    problem = Problem(np.full(8, 0.5), budget=60, window=4, seed=0, step=0.1)
    assert paced_by_budget(name, problem, 600) == paced


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("90s", 90), ("0.5h", 1800)]
)
def test_a_time_has_units(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
    assert seconds_of(duration(seconds)) == seconds
    limits = LimitsConfig.model_validate({"wall_clock": text})
    assert LimitsConfig.model_validate(limits.model_dump(mode="json")) == limits


@pytest.mark.parametrize("text", ["8", 8, "", "h", "0s", "-1h", "8 hours", "1m1h", None])
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("changes", "ended", "said"),
    [
        ({"budget": 20}, True, "--budget 20: the run has asked for 30 candidates already; give at least 31"),
        ({"budget": 30}, True, "give at least 31"),
        ({"budget": 29}, False, "give at least 30"),
        ({"budget": 40, "wall_clock": "1h"}, True, "has used 2h of --wall-clock already"),
        ({"budget": 40, "gpu_hours": 1}, True, "has used 1.5 of --gpu-hours already"),
        ({"budget": 40, "item_evaluations": 600}, False, "has used 600 of --item-evaluations already"),
        ({"budget": 40, "item_evaluations": 619}, True, "would be 619; give at least 620 with --item-evaluations"),
    ],
)
def test_a_budget_that_allows_nothing_more_is_refused(changes: dict[str, object], ended: bool, said: str) -> None:
    used = Used(candidates=30, item_evaluations=600, gpu_hours=1.5, wall_clock=7200)
    with pytest.raises(UserError) as refused:
        refuse_useless(Budget(30).changed(changes), used, ended, ITEMS)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_items_are_counted_by_the_first_candidate_that_was_scored_on_all_of_them(tmp_path: Path) -> None:
    def trial(candidate: int, count: int, scored: int | None) -> Trial:
        rows = Scores(tuple(str(item) for item in range(count)), {"nll": np.ones(count)}, np.ones(count))
        return Trial(candidate, "search", scores={"e": rows}, scored=scored, attempts=1)

    events = [Ask(id_, "search", None, str(id_)) for id_ in range(3)] + [
        trial(0, 4, 4),
        trial(1, 40, None),
        trial(2, 6, 6),
    ]
    assert Used.of(events, Sessions(tmp_path / "none")).item_evaluations == 50

"""A driver whose candidates race: the same history however it was run, and told results that do not mislead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from driving import content, search_in
from landscape import population
from racing_landscape import ITEMS, SEED, TABLE, WINDOW, Racing

from search.budget import Budget, Spending, Used
from search.driver import Limits
from search.in_flight import Key
from search.racing.config import FitnessConfig
from search.racing.fitness import Fitness, censored_loss
from search.store.events import Ask, Event, LimitReached, Trial
from search.store.sessions import Sessions


def drive(
    folder: Path,
    pool: Racing,
    *,
    budget: int = 70,
    ordered: bool = True,
    stop_after: int | None = None,
    most_items: int | None = None,
    normalize: str = "parents",
) -> list[Event]:
    config = FitnessConfig(racing=True, smallest=6, precision=0.04)
    return search_in(
        folder,
        pool,
        population(100, WINDOW, normalize, fitness=Fitness(config, {"e": TABLE}, SEED, WINDOW)),
        Limits(budget, WINDOW, ordered),
        spending=Spending(Budget(budget, most_items), ITEMS),
        stop_after=stop_after,
        selected=(3, 5),
    )


def trials_of(events: Sequence[Event]) -> dict[Key, Trial]:
    return {(event.candidate, event.items): event for event in events if isinstance(event, Trial)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """The history of a run that nothing disturbed, on one worker."""
    return drive(tmp_path_factory.mktemp("whole"), Racing(1, 0))


def test_the_landscape_has_stopped_partial_and_complete_candidates(whole: list[Event]) -> None:
    trials = [t for t in trials_of(whole).values() if t.items == "search" and not t.failure_kind]
    assert any(t.censored for t in trials)
    assert len({t.scored for t in trials}) >= 4
    assert all(t.scored is None for t in trials_of(whole).values() if t.items == "select")


@pytest.mark.parametrize(("workers", "seed"), [(1, 5), (2, 1), (4, 3), (30, 5)])
def test_the_history_is_the_same_for_any_number_of_workers(
    workers: int, seed: int, whole: list[Event], tmp_path: Path
) -> None:
    assert content(drive(tmp_path, Racing(workers, seed))) == content(whole)


@pytest.mark.parametrize("normalize", ["none", "parents"])
def test_a_driver_that_dies_resumes_to_the_same_history(normalize: str, tmp_path: Path) -> None:
    reference = content(drive(tmp_path / "whole", Racing(1, 0), normalize=normalize))
    for cut in range(1, len(reference), 29):
        folder = tmp_path / str(cut)
        first = drive(folder, Racing(3, cut), stop_after=cut, normalize=normalize)
        assert content(first) == reference[: len(first)]
        assert content(drive(folder, Racing(2, cut + 1), normalize=normalize)) == reference
        shutil.rmtree(folder)


def test_by_arrival_it_goes_on_where_it_died(tmp_path: Path) -> None:
    for cut in (7, 40, 90):
        folder = tmp_path / str(cut)
        first = drive(folder, Racing(3, cut), ordered=False, stop_after=cut)
        after = drive(folder, Racing(2, cut), ordered=False)
        assert content(after)[: len(first)] == content(first)
        assert sum(isinstance(event, Ask) for event in after) == 70


def test_an_extended_run_is_that_with_the_larger_budget_from_its_start(whole: list[Event], tmp_path: Path) -> None:
    drive(tmp_path, Racing(2, 1), budget=45)
    extended = drive(tmp_path, Racing(3, 2), budget=70)

    def asks(events: Sequence[Event]) -> list[object]:
        return [event.deterministic() for event in events if isinstance(event, Ask)]

    assert asks(extended) == asks(whole)
    searched = {key: one.deterministic() for key, one in trials_of(whole).items() if key[1] == "search"}
    assert {k: t.deterministic() for k, t in trials_of(extended).items() if k[1] == "search"} == searched


def test_item_evaluations_are_those_that_were_scored_and_end_the_search_at_the_same_candidate(tmp_path: Path) -> None:
    pool = Racing(2, 1)
    events = drive(tmp_path / "a", pool, most_items=1500)
    used = Used.of(events, Sessions(tmp_path / "none"), ITEMS)
    assert used.item_evaluations <= 1500
    assert any(isinstance(event, LimitReached) for event in events)
    assert used.item_evaluations == pool.items
    drive(tmp_path / "b", Racing(3, 2), most_items=1500, stop_after=31)
    assert content(drive(tmp_path / "b", Racing(1, 2), most_items=1500)) == content(events)


def test_the_loss_of_a_stopped_candidate_is_that_of_its_reference_or_worse_and_in_order() -> None:
    for reference in (-2.0, 0.0, 0.7):
        estimates = reference + np.linspace(-0.02, 0.5, 200)
        told = [censored_loss(float(estimate), reference) for estimate in estimates]
        assert all(loss >= reference for loss in told)
        assert all(later > earlier for earlier, later in pairwise(told))
    assert math.isclose(censored_loss(5.0, 1.0), 5.0)
    assert censored_loss(-1e9, 1.0) >= 1.0


def test_a_stopped_candidate_never_becomes_the_best(whole: list[Event]) -> None:
    trials = [t for t in trials_of(whole).values() if t.items == "search" and t.loss is not None]
    for stopped in (t for t in trials if t.censored):
        others = [t.loss for t in trials if t.candidate < stopped.candidate and not t.censored and t.loss is not None]
        assert stopped.loss is not None
        assert stopped.loss > min(others)

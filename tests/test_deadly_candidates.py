"""Candidates that kill workers, in a real search on Ray: driver, history and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from landscape import DEADLY, Landscape, Shuffled, population
from worker_bodies import plan, starts

from cluster.pool import RayPool
from search.driver import Driver, Limits
from search.pool import Failure, Job, Outcome, Pool
from search.store.events import Ask, Event, Trial
from search.store.history import History, digest
from search.store.spool import Spool

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

BUDGET, WINDOW = 40, 4


class Searched(NamedTuple):
    """A search that is done: its events, what the optimiser was told, and what its workers started."""

    events: list[Event]
    told: dict[int, Mapping[str, float] | None]
    started: list[int]


def search(folder: Path, make_pool: Callable[[], Pool]) -> Searched:
    told: dict[int, Mapping[str, float] | None] = {}
    people = population(BUDGET, WINDOW)
    tell = people.tell

    def listen(candidate: int, metrics: Mapping[str, float] | None, *more: Any, **named: Any) -> None:
        assert candidate not in told
        told[candidate] = metrics
        tell(candidate, metrics, *more, **named)

    people.tell = listen  # type: ignore[method-assign]
    with History.open(folder / "history") as history:
        driver = Driver(people, history, Spool(folder / "spool"), make_pool, Limits(BUDGET, WINDOW))
        try:
            driver.search()
        finally:
            driver.close()
        return Searched(history.events(), told, starts(folder))


def on_ray(folder: Path, workers: int) -> Searched:
    folder.mkdir()
    return search(
        folder, lambda: RayPool(plan(folder), workers=workers, body="landscape:Deadly", working_folder=folder)
    )


@pytest.fixture(scope="module")
def two_workers(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The search on two workers, some of whose candidates end the process that evaluates them."""
    return on_ray(tmp_path_factory.mktemp("deadly") / "two", 2)


def trials(searched: Searched) -> dict[int, Trial]:
    return {event.candidate: event for event in searched.events if isinstance(event, Trial)}


def test_a_candidate_that_kills_two_workers_is_recorded_as_failed_and_told_as_such(two_workers: Searched) -> None:
    found = trials(two_workers)
    assert sorted(found) == list(range(BUDGET))
    crashed = {candidate: trial for candidate, trial in found.items() if trial.failure_kind == "crash"}
    assert sorted(crashed) == list(DEADLY)
    worst = max(trial.loss for trial in found.values() if trial.failure_kind is None and trial.loss is not None)
    for candidate, trial in crashed.items():
        assert trial.attempts == 2
        assert trial.failure_message.startswith("took down 2 workers, the last time: its process died")
        assert not trial.metrics
        assert not trial.feasible
        assert trial.loss is not None
        assert trial.loss > worst
        assert two_workers.told[candidate] is None
    assert {candidate for candidate, metrics in two_workers.told.items() if metrics is None} > set(DEADLY)


def test_it_is_started_twice_and_never_again_and_no_other_candidate_pays_for_it(two_workers: Searched) -> None:
    asked = {event.candidate for event in two_workers.events if isinstance(event, Ask)}
    assert asked == set(range(BUDGET))
    started = {candidate: two_workers.started.count(candidate) for candidate in asked}
    assert {candidate for candidate, times in started.items() if times > 1} == set(DEADLY)
    assert max(started.values()) == 2
    others = [trial for candidate, trial in trials(two_workers).items() if candidate not in DEADLY]
    assert {trial.failure_message for trial in others} == {"", "every eleventh fails"}
    assert {trial.attempts for trial in others} <= {0, 1}


def test_the_history_does_not_depend_on_the_workers_that_they_kill(
    two_workers: Searched, ray_session: Session, tmp_path: Path
) -> None:
    three = on_ray(tmp_path / "three", 3)
    assert digest(three.events) == digest(two_workers.events)
    assert three.told == two_workers.told

    class Announced(Landscape):
        """The same candidates fail here, and no process ends."""

        def run(self, job: Job) -> Outcome:
            outcome = super().run(job)
            deadly = replace(outcome, scores={}, metrics={}, weights_sha256=None, failure=Failure("crash", "as told"))
            return deadly if job.candidate in DEADLY else outcome

    pool = Shuffled(3, seed=1, body=Announced().run)
    assert digest(search(tmp_path / "local", lambda: pool).events) == digest(two_workers.events)

"""A driver whose candidates are scored on parts of the items: the same history however it was run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscape import Shuffled, loss_of, population
from test_racing_driver import HARD, ITEMS, NOISY, SEED, WINDOW, Table

from evaluators.base import Scores
from search.budget import Budget, Spending, Used, limit_in_force
from search.driver import Driver, Limits
from search.pool import Failure, Job, Outcome
from search.progress import Progress
from search.racing.config import FitnessConfig
from search.racing.kinds import make_fitness
from search.racing.ladder import item_order
from search.replay import replay_ordered
from search.store.events import Ask, Event, Extended, Trial
from search.store.history import History
from search.store.sessions import Sessions
from search.store.spool import Spool

WEIGHTS = np.ones(ITEMS)


def run(job: Job) -> Outcome:
    """What `search.evaluation` does, with a formula for a model; every eleventh candidate fails."""
    if job.candidate % 11 == 9:
        return Outcome(job.candidate, job.items, failure=Failure("error", "every eleventh fails"))
    items = tuple(Table().items(job.items))
    shares = [float(job.recipe.rules[0].sources.get(name, {}).get("weight", 0.0)) for name in ("a", "b", "c")]
    losses = HARD + 2 * loss_of(job.recipe) + NOISY @ (np.array(shares) * np.roll(shares, 1))
    race, chosen, censored = job.race, items, False
    scores: dict[str, Scores] = {}
    for rung, sizes in enumerate([{"e": ITEMS}] if race is None else race.rungs):
        if race is not None:
            chosen = tuple(race.chosen("e", item_order(SEED, "e", items)))[: sizes["e"]]
        places = [items.index(item) for item in chosen]
        scores = {"e": Scores(chosen, {"loss": losses[places]}, WEIGHTS[places])}
        if race is not None and race.stops(rung, scores):
            censored = True
            break
    mean = float(scores["e"].values["loss"].mean())
    sha = job.recipe.hash if job.hash_weights else None
    return Outcome(job.candidate, job.items, scores, {"e.loss": mean}, weights_sha256=sha, censored=censored)


class Pool(Shuffled):
    """With that body; counts the items that it scored."""

    def __init__(self, workers: int, seed: int) -> None:
        super().__init__(workers, seed)
        self._order = random.Random(seed)
        self.items = 0

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        if not self._queue:
            return ()
        index = self._order.randrange(self.busy)
        job = self._queue[index]
        del self._queue[index]
        self.ran.append(job.key)
        outcome = run(job)
        if job.items == "search":
            self.items += len(outcome.scores["e"].items) if outcome.scores else job.race.items if job.race else ITEMS
        return (outcome,)


class Stop(Exception):  # noqa: N818 - stands for the end of the process
    """The driver dies here."""


def drive(
    folder: Path,
    pool: Pool,
    *,
    budget: int = 90,
    ordered: bool = True,
    stop_after: int | None = None,
    most_items: int | None = None,
    fitness: dict[str, Any] | None = None,
    extended: bool = False,
) -> list[Event]:
    config = FitnessConfig.model_validate(fitness or {"rotate": True})
    made = make_fitness(config, {"e": Table()}, SEED, WINDOW, front=False)
    with History.open(folder / "history", events_per_segment=30) as history:
        if extended:
            history.append(Extended(Budget(budget, most_items).to_json()))
        before = len(history.events())

        def watch(state: Progress) -> None:
            if stop_after is not None and len(history.events()) - before >= stop_after:
                raise Stop

        driver = Driver(
            population(100, WINDOW, "parents", "gaussian_process", fitness=made),
            history,
            Spool(folder / "spool"),
            lambda: pool,
            Limits(budget, WINDOW, ordered),
            watch,
            spending=Spending(Budget(budget, most_items), ITEMS),
        )
        with contextlib.suppress(Stop):
            driver.search()
        return history.events()


def content(events: Sequence[Event]) -> list[object]:
    return [event.deterministic() for event in events if not isinstance(event, Extended)]


def searched(events: Sequence[Event]) -> list[Trial]:
    origins = {event.candidate: event.origin for event in events if isinstance(event, Ask)}
    return [event for event in events if isinstance(event, Trial) and origins[event.candidate] == "search"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return drive(tmp_path_factory.mktemp("whole"), Pool(1, 0))


def test_the_history_is_the_same_after_every_stop_with_failures_on_any_number_of_workers(
    whole: list[Event], tmp_path: Path
) -> None:
    assert any(trial.scored is None and not trial.failure_kind for trial in searched(whole))
    for number, stop_after in enumerate((20, 61, 98)):
        folder = tmp_path / str(number)
        drive(folder, Pool(3, number), stop_after=stop_after)
        assert content(drive(folder, Pool(4, 50 + number))) == content(whole)


def test_what_is_expected_is_in_the_unit_of_the_loss(whole: list[Event]) -> None:
    made = make_fitness(FitnessConfig(rotate=True), {"e": Table()}, SEED, WINDOW, front=False)
    told = population(100, WINDOW, "parents", "gaussian_process", fitness=made)
    assert not replay_ordered(whole, told, WINDOW)
    complete = {t.candidate: t.loss for t in searched(whole) if t.scored is None and not t.failure_kind}
    assert complete
    for candidate, loss in complete.items():
        assert told.expected(candidate) == pytest.approx(loss, abs=0.02)


def test_an_extended_run_asks_what_one_with_the_larger_budget_asks(whole: list[Event], tmp_path: Path) -> None:
    drive(tmp_path, Pool(2, 5), budget=40)
    drive(tmp_path, Pool(3, 6), budget=63, extended=True)
    found = drive(tmp_path, Pool(1, 7), extended=True)
    assert sorted(map(repr, content(found))) == sorted(map(repr, content(whole)))


def test_a_run_in_order_of_arrival_goes_on_after_stops(tmp_path: Path) -> None:
    first = drive(tmp_path, Pool(3, 1), ordered=False, stop_after=70)
    again = drive(tmp_path, Pool(2, 2), ordered=False, stop_after=50)
    assert content(again)[: len(first)] == content(first)
    found = drive(tmp_path, Pool(2, 3), ordered=False)
    assert sum(isinstance(event, Ask) for event in found) == 90


def test_a_limit_of_items_holds_and_ends_at_the_same_candidate(tmp_path: Path) -> None:
    most_items = 900
    pool = Pool(1, 0)
    one = drive(tmp_path / "one", pool, most_items=most_items, budget=500)
    limit = limit_in_force(one)
    assert limit is not None
    assert pool.items == limit.used <= most_items
    assert pool.items > most_items - 2 * ITEMS
    assert Used.of(one, Sessions(tmp_path / "none"), ITEMS).item_evaluations == pool.items
    assert content(drive(tmp_path / "other", Pool(4, 9), most_items=most_items, budget=500)) == content(one)


def test_racing_stops_candidates_of_an_optimiser_that_could_put_parts_together(tmp_path: Path) -> None:
    found = drive(tmp_path, Pool(2, 0), fitness={"racing": True, "smallest": 6, "precision": 0.04})
    assert any(trial.scored is not None and not trial.failure_kind for trial in searched(found))

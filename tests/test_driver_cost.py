"""What the driver does per trial does not grow with the run, the window or the pool: counted, not timed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from packages import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from scheduling.metering import PARTS, metered_search
from scheduling.problem import make_population, score
from scheduling.simulated_pool import Fates, SimulatedPool, log_normal
from scheduling.utilisation import GENERATION_0

from search.candidate import Candidate
from search.driver import STEPS, Driver, Limits
from search.in_flight import InFlight
from search.pool import Job, Outcome
from search.store.events import Ask, Trial
from search.store.history import History
from search.store.spool import Spool

FATES = Fates(log_normal(60.0, 0.5))


@contextmanager
def counting(*names: str) -> Iterator[Counter[str]]:
    """How often functions of `os` are called."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(os, name) for name in names}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(os, name, counted(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def drive(
    folder: Path, pool: SimulatedPool, *, window: int, budget: int, ordered: bool = True, **options: Any
) -> Driver:
    population = make_population(budget=budget, window=window, layers=1, optimizer="random_search")
    with History.open(folder / "history", events_per_segment=10**6) as history:
        limits = Limits(budget, window, ordered)
        driver = Driver(population, history, Spool(folder / "spool"), lambda: pool, limits, **options)
        driver.search()
    return driver


@pytest.mark.parametrize("workers", [8, 200])
def test_a_trial_costs_at_most_one_sync_of_the_history_and_one_of_the_spool(workers: int, tmp_path: Path) -> None:
    """Before, it cost four, two of them for a file of its own."""
    pool = SimulatedPool(workers, FATES, score)
    with counting("fsync") as counts:
        drive(tmp_path, pool, window=2 * workers, budget=600)
    # One for every round that decided something, one for every result that came alone and before its turn.
    assert counts["fsync"] <= 2 * 600 + 40


def test_in_arrival_order_nothing_waits_so_nothing_is_kept(tmp_path: Path) -> None:
    pool = SimulatedPool(8, FATES, score)
    with counting("fsync") as counts:
        drive(tmp_path, pool, window=16, budget=300, ordered=False)
    assert counts["fsync"] <= 300 + 40
    assert not list((tmp_path / "spool").glob("*.arrow*"))


def test_what_arrives_together_is_written_together(tmp_path: Path) -> None:
    pool = SimulatedPool(64, Fates(lambda _: 60.0), score)  # all end at the same moment
    with counting("fsync") as counts:
        drive(tmp_path, pool, window=128, budget=64 * 20)
    decisions = 2 * 64 * 20
    assert counts["fsync"] <= 3 * decisions / STEPS + 100


def test_nothing_is_sent_before_the_asks_and_results_that_led_to_it_are_on_disk(tmp_path: Path) -> None:
    class Checking(SimulatedPool):
        checked = 0

        def submit(self, job: Job) -> None:
            reader = History.open(tmp_path / "history", writable=False)
            events = reader.events()
            asked = [event.candidate for event in events if isinstance(event, Ask)]
            told = [event.candidate for event in events if isinstance(event, Trial)]
            assert job.candidate in asked
            # A candidate is asked when the one before the window is told.
            assert job.candidate - 12 in told or job.candidate < 12
            self.checked += 1
            super().submit(job)

    pool = Checking(6, FATES, score)
    drive(tmp_path, pool, window=12, budget=60)
    assert pool.checked == 60


def test_no_result_is_lost_that_the_pool_handed_over_before_the_user_stopped_the_search(tmp_path: Path) -> None:
    pool = SimulatedPool(30, Fates(lambda chance: 60.0 + chance.random() // 0.2), score)
    handed: list[int] = []
    original = pool.wait

    def wait(timeout: float | None = None) -> Sequence[Outcome]:
        found = original(timeout)
        handed.extend(outcome.candidate for outcome in found)
        return found

    pool.wait = wait  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        drive(tmp_path, pool, window=60, budget=200, stop=lambda: len(handed) > 70)
    told = {event.candidate for event in History.open(tmp_path / "history", writable=False) if isinstance(event, Trial)}
    kept = {candidate for candidate, _ in Spool(tmp_path / "spool").take_all()}
    assert len(handed) > 70
    assert set(handed) <= told | kept


def test_the_work_per_trial_is_the_same_for_a_window_of_ten_and_of_a_thousand(tmp_path: Path) -> None:
    """Function calls inside the driver's own modules, per trial."""
    calls = {}
    for window in (10, 1000):
        count = 0

        def watch(frame: Any, event: str, argument: object) -> None:
            nonlocal count
            name = frame.f_code.co_filename
            count += event == "call" and name.endswith(("driver.py", "in_flight.py", "population.py", "spool.py"))

        pool = SimulatedPool(window // 2, FATES, score)
        sys.setprofile(watch)
        try:
            drive(tmp_path / str(window), pool, window=window, budget=1500)
        finally:
            sys.setprofile(None)
        calls[window] = count / 1500
    assert calls[1000] <= 1.2 * calls[10]


def test_the_list_of_all_candidates_is_not_copied_for_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search.population import Population

    copies = 0
    original = Population.candidates

    def candidates(self: Population) -> tuple[Candidate, ...]:
        nonlocal copies
        copies += 1
        assert original.fget is not None
        found: tuple[Candidate, ...] = original.fget(self)
        return found

    monkeypatch.setattr(Population, "candidates", property(candidates))
    drive(tmp_path, SimulatedPool(8, FATES, score), window=16, budget=200)
    assert copies <= 3


def test_only_the_recipes_of_generation_0_are_hashed_from_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search.recipe import Recipe

    hashed = 0
    original = Recipe.canonical

    def canonical(self: Recipe) -> dict[str, Any]:
        nonlocal hashed
        hashed += 1
        return original(self)

    monkeypatch.setattr(Recipe, "canonical", canonical)
    drive(tmp_path, SimulatedPool(8, FATES, score), window=16, budget=200)
    assert hashed == GENERATION_0 + 1  # and the pattern from which all others come


@pytest.mark.parametrize("ordered", [True, False])
def test_results_in_flight_are_taken_in_their_order_and_never_twice(ordered: bool) -> None:
    def outcome(candidate: int) -> Outcome:
        return Outcome(candidate, "search")

    flight = InFlight(ordered, {(3, "search"): outcome(3)})
    for candidate in range(4):
        flight.open((candidate, "search"))
        flight.open((candidate, "search"))
    assert len(flight) == 4
    assert not flight.arrive(outcome(3))  # it is there already
    assert not flight.arrive(outcome(9))  # nobody asked
    assert flight.arrive(outcome(1))
    assert not flight.arrive(outcome(1))
    taken = []
    if ordered:
        assert flight.take() is None
        assert flight.arrive(outcome(0))
        assert flight.arrive(outcome(2))
    while (found := flight.take()) is not None:
        taken.append(found.candidate)
    assert taken == ([0, 1, 2, 3] if ordered else [3, 1])
    assert (3, "search") not in flight
    assert len(flight) == (0 if ordered else 2)


def test_the_meter_charges_every_trial_for_every_part_of_the_work(tmp_path: Path) -> None:
    pool = SimulatedPool(4, FATES, score)

    def make(kind: Any) -> Any:
        return make_population(kind, budget=60, window=8, layers=1, optimizer="random_search")

    meter = metered_search(tmp_path, pool, make, Limits(60, 8))
    assert sorted(meter.spent) == list(range(60))
    searched: list[Mapping[str, float]] = [parts for number, parts in meter.spent.items() if number >= GENERATION_0]
    for part in ("ask", "record", "tell", "submit", "loop"):
        assert all(parts[part] > 0 for parts in searched), part
    assert any(parts["keep"] > 0 for parts in searched)
    assert all(parts["collect"] == 0 for parts in searched)  # simulated workers are no cost of the driver
    assert all(set(parts) == set(PARTS) for parts in searched)

"""The driver against simulated workers: the protocol, determinism, failures, utilisation in virtual time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from packages import ROOT
from worker_bodies import job

sys.path.append(str(ROOT / "benchmarks"))

from scheduling.problem import make_population, score
from scheduling.simulated_pool import Fates, SimulatedPool, log_normal, pareto
from scheduling.utilisation import ARRIVAL, BARRIER, ORDERED, Discipline, simulated, utilisation

from search.driver import Driver, Limits
from search.pool import Outcome
from search.store.events import Ask, Event, Trial
from search.store.history import History
from search.store.spool import Spool

TIMES = log_normal(60.0, 0.5)
TROUBLE = Fates(pareto(60.0, 1.5), seed=3, crash=0.1, error=0.05)


def square(job: object) -> Outcome:
    return Outcome(job.candidate, job.items, metrics={"e.loss": float(job.candidate)})  # type: ignore[attr-defined]


def drain(pool: SimulatedPool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while found := pool.wait(0.5):
        outcomes += found
    return outcomes


def drive(
    folder: Path,
    pool: SimulatedPool,
    *,
    window: int,
    budget: int,
    ordered: bool = True,
    optimizer: str = "random_search",
) -> list[Event]:
    population = make_population(budget=budget, window=window, layers=1, optimizer=optimizer)
    with History.open(folder / "history") as history:
        Driver(population, history, Spool(folder / "spool"), lambda: pool, Limits(budget, window, ordered)).search()
        return history.events()


def told(events: list[Event]) -> list[int]:
    return [event.candidate for event in events if isinstance(event, Trial)]


def test_every_job_comes_back_once_and_again_the_same_from_the_same_seed() -> None:
    found = []
    for _ in range(2):
        pool = SimulatedPool(7, TROUBLE, square, trial_seconds=300.0, replace_seconds=5.0)
        for candidate in range(300):
            pool.submit(job(candidate))
        assert (pool.size, pool.busy) == (7, 0)
        outcomes = drain(pool)
        assert sorted(outcome.candidate for outcome in outcomes) == list(range(300))
        assert pool.busy == 0
        found.append([(o.candidate, o.worker, o.attempts, o.failure, o.evaluate_seconds) for o in outcomes])
    assert found[0] == found[1]
    kinds = Counter("none" if failure is None else failure.kind for _, _, _, failure, _ in found[0])
    assert set(kinds) == {"none", "error", "crash", "timeout"}
    # A crash or an overrun is tried again; who lost two workers is given up.
    assert {attempts for _, _, attempts, _, _ in found[0]} == {1, 2}
    assert all(o[2] == 2 for o in found[0] if o[3] is not None and o[3].kind in ("crash", "timeout"))
    assert max(seconds for *_, seconds in found[0]) <= 300.0 + 1e-6


def test_what_happens_to_a_job_depends_on_nothing_but_the_job() -> None:
    endings = []
    for workers, order in ((1, range(40)), (5, reversed(range(40))), (40, range(40))):
        pool = SimulatedPool(workers, TROUBLE, square)
        for candidate in order:
            pool.submit(job(candidate))
        outcomes = drain(pool)
        endings.append({o.candidate: (o.attempts, o.failure and o.failure.kind) for o in outcomes})
    assert endings[0] == endings[1] == endings[2]


def test_durations_have_the_mean_that_was_asked_for() -> None:
    for draw, tolerance in ((log_normal(60.0, 0.5), 0.02), (pareto(60.0, 3.0), 0.05)):
        fates = Fates(draw)
        seconds = [fates.of(job(candidate), 1)[0] for candidate in range(5000)]
        assert sum(seconds) / 5000 == pytest.approx(60.0, rel=tolerance)


def test_a_submitted_job_is_refused_twice_and_forgotten_when_it_is_cancelled() -> None:
    pool = SimulatedPool(1, Fates(TIMES), square)
    for candidate in range(3):
        pool.submit(job(candidate))
    with pytest.raises(ValueError, match="twice"):
        pool.submit(job(1))
    assert pool.wait(0) == ()  # the first starts
    assert pool.busy == 1
    pool.cancel((0, "search"))
    pool.cancel((1, "search"))
    assert [outcome.candidate for outcome in drain(pool)] == [2]
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.submit(job(5))


@pytest.mark.parametrize("workers", [1, 8, 100])
def test_failures_and_heavy_tails_on_any_number_of_workers_make_the_same_history(workers: int, tmp_path: Path) -> None:
    found = []
    for number in (3, workers):
        pool = SimulatedPool(number, TROUBLE, score, trial_seconds=300.0, replace_seconds=5.0)
        events = drive(tmp_path / str(len(found)), pool, window=16, budget=80, optimizer="diagonal_cma")
        found.append([event.deterministic() for event in events])
        assert told(events) == list(range(80))
    assert found[0] == found[1]


def test_a_driver_that_is_killed_goes_on_with_a_thousand_workers_without_running_anything_twice(tmp_path: Path) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    class Dying(SimulatedPool):
        def wait(self, timeout: float | None = None) -> object:  # type: ignore[override]
            if len(self.stints) > 700:
                raise Killed
            return super().wait(timeout)

    def heavy(kind: type[SimulatedPool]) -> SimulatedPool:
        return kind(1000, Fates(pareto(60.0, 1.5), seed=1), score)

    first = heavy(Dying)
    with pytest.raises(Killed):
        drive(tmp_path / "a", first, window=2000, budget=2500)
    second = heavy(SimulatedPool)
    events = drive(tmp_path / "a", second, window=2000, budget=2500)
    assert told(events) == list(range(2500))
    whole = drive(tmp_path / "b", heavy(SimulatedPool), window=2000, budget=2500)
    assert [e.deterministic() for e in events] == [e.deterministic() for e in whole]
    ended = {stint.key for stint in first.stints}
    # What had come in when the driver died is not run again, told or not.
    again = ended & {stint.key for stint in second.stints}
    assert len(ended) > 700
    assert len(again) <= 1  # what the pool had not handed over yet


def test_with_a_window_beyond_the_workers_one_that_becomes_free_finds_a_job_queued(tmp_path: Path) -> None:
    """The next candidate is decided before the last one ends."""
    _, pool = simulated(tmp_path / "arrival", Fates(TIMES), ARRIVAL, workers=8, budget=400)
    # Not so only at the end, when the last ones are under way, and in generation 0, which waits for its parents.
    assert pool.starved <= 8 + 4
    tight = Discipline("no candidate more than there are workers", 1, ordered=False)
    _, pool = simulated(tmp_path / "tight", Fates(TIMES), tight, workers=8, budget=400)
    assert pool.starved == pool.freed == 400
    # Ordered commit, durations that differ little: the head never blocks for long.
    _, pool = simulated(tmp_path / "ordered", Fates(log_normal(60.0, 0.1)), ORDERED, workers=8, budget=400)
    assert pool.starved <= 8 + 4


def test_eight_workers_are_busy_in_both_orders_and_not_with_a_barrier(tmp_path: Path) -> None:
    """Log-normal times with a coefficient of variation of 0.5; virtual time, so the figures are exact."""
    shares = {}
    for number, discipline in enumerate((ARRIVAL, ORDERED, BARRIER)):
        shares[discipline], _ = simulated(tmp_path / str(number), Fates(TIMES), discipline, workers=8, budget=1200)
    assert shares[ARRIVAL] >= 0.97
    assert shares[ORDERED] >= 0.90
    assert 0.5 < shares[BARRIER] < 0.62


def test_time_that_the_driver_takes_for_a_job_is_time_that_free_workers_wait(tmp_path: Path) -> None:
    quick, _ = simulated(tmp_path / "quick", Fates(TIMES), ARRIVAL, workers=8, budget=200, submit_seconds=0.002)
    slow, _ = simulated(tmp_path / "slow", Fates(TIMES), ARRIVAL, workers=8, budget=200, submit_seconds=10.0)
    assert quick > 0.97 > 0.9 > slow


def test_utilisation_counts_from_the_first_to_the_last_start_of_a_searched_candidate(tmp_path: Path) -> None:
    pool = SimulatedPool(2, Fates(lambda _: 10.0), square)
    for candidate in range(4, 9):  # two at a time: the fifth alone, at the end
        pool.submit(job(candidate))
    drain(pool)
    assert utilisation(pool.stints, 2) == 1.0
    assert pool.now == 30.0


def test_a_search_on_ten_thousand_workers_asks_everything_once_and_in_order(tmp_path: Path) -> None:
    pool = SimulatedPool(10_000, Fates(log_normal(60.0, 0.5), crash=0.01, error=0.01), score, replace_seconds=5.0)
    events = drive(tmp_path, pool, window=500, budget=1500)
    assert [event.candidate for event in events if isinstance(event, Ask)] == list(range(1500))
    assert told(events) == list(range(1500))
    # Started and ended once each; a few more for crashes. None of it depends on the number of workers.
    assert 3000 <= pool.operations <= 3300

"""What the driver spends on every trial, and on which part of its work.

The parts are measured where the driver calls them, so the driver itself is the one that users run. What
several trials share (a write, a look at the pool) is divided among them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluators.base import ItemPool
from search.candidate import Candidate
from search.driver import Driver, Limits
from search.pool import Job, Outcome, Pool
from search.population import Population
from search.store.events import Ask, Event, Trial
from search.store.history import History
from search.store.spool import Spool

PARTS = ("ask", "record", "keep", "tell", "submit", "collect", "loop")
"""keep: results that wait for their turn are written to the spool; loop: all that is none of the others."""


class Meter:
    """Seconds per candidate and part, and on the processor in all."""

    def __init__(self) -> None:
        self.spent: defaultdict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PARTS, 0.0))
        self.cpu_seconds = 0.0
        self._inside = False
        self._spent_in_round = self._unshared = 0.0
        self._recorded: list[int] = []
        self._round_began: float | None = None

    @contextmanager
    def measured(self, part: str, among: list[int]) -> Iterator[None]:
        """Charge what is done inside to the candidates that are in `among` at its end."""
        if self._inside:  # one measured part calls another
            yield
            return
        self._inside = True
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._inside = False
            self._spent_in_round += spent
            self.share(part, spent, among)

    def share(self, part: str, seconds: float, among: Sequence[int]) -> None:
        """Divide seconds among candidates; nobody gets them when there are none."""
        for candidate in among:
            self.spent[candidate][part] += seconds / len(among)

    def recorded(self, candidate: int) -> None:
        """The result of a candidate was recorded in this round."""
        self._recorded.append(candidate)

    def round(self, *, begins: bool) -> None:
        """The driver comes back from the pool, or goes there."""
        now = time.perf_counter()
        if not begins and self._round_began is not None:
            self._unshared += now - self._round_began - self._spent_in_round
            if self._recorded:
                self.share("loop", self._unshared, self._recorded)
                self._unshared = 0.0
            self._recorded = []
        self._round_began, self._spent_in_round = now, 0.0


class _Population(Population):
    meter: Meter

    def ask(self) -> Candidate | None:
        among: list[int] = []
        with self.meter.measured("ask", among):
            candidate = super().ask()
            if candidate is not None:
                among.append(candidate.id)
        return candidate

    def tell(self, candidate: int, *args: Any, **kwargs: Any) -> None:
        with self.meter.measured("tell", [candidate]):
            super().tell(candidate, *args, **kwargs)


class _History(History):
    meter: Meter

    def append(self, event: Event) -> None:
        self._append([event], lambda: History.append(self, event))

    def append_all(self, events: Sequence[Event]) -> None:
        self._append(events, lambda: History.append_all(self, events))

    def _append(self, events: Iterable[Event], append: Callable[[], None]) -> None:
        found = [event for event in events if isinstance(event, Ask | Trial)]
        with self.meter.measured("record", [event.candidate for event in found]):
            append()
        for event in found:
            if isinstance(event, Trial):
                self.meter.recorded(event.candidate)


class _Spool(Spool):
    meter: Meter

    def put(self, candidate: int, items: ItemPool, trial: Trial) -> None:
        with self.meter.measured("keep", [candidate]):
            super().put(candidate, items, trial)

    def put_all(self, trials: Sequence[Trial]) -> None:
        with self.meter.measured("keep", [trial.candidate for trial in trials]):
            super().put_all(trials)

    def drop(self, candidate: int, items: ItemPool) -> None:
        with self.meter.measured("keep", [candidate]):
            super().drop(candidate, items)


class _Pool:
    """A pool that is measured. Of `wait`, what the processor did for the driver's thread counts, not the waiting."""

    def __init__(self, pool: Pool, meter: Meter, real: bool) -> None:
        self._pool, self._meter, self._real = pool, meter, real
        self._unshared = 0.0

    @property
    def size(self) -> int:
        return self._pool.size

    @property
    def busy(self) -> int:
        return self._pool.busy

    def submit(self, job: Job) -> None:
        with self._meter.measured("submit", [job.candidate]):
            self._pool.submit(job)

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        self._meter.round(begins=False)
        began = time.thread_time()
        outcomes = self._pool.wait(timeout)
        spent = time.thread_time() - began
        self._unshared += spent
        if not self._real:
            self._meter.cpu_seconds -= spent
        if outcomes and self._real:  # what simulated workers cost is no cost of the driver
            self._meter.share("collect", self._unshared, [outcome.candidate for outcome in outcomes])
            self._unshared = 0.0
        self._meter.round(begins=True)
        return outcomes

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        self._pool.cancel(key)

    def close(self) -> None:
        self._pool.close()


def metered_search(
    folder: Path,
    pool: Pool,
    make: Callable[[type[Population]], Population],
    limits: Limits,
    *,
    real: bool = False,
) -> Meter:
    """Search to the budget and say what it cost.

    Args:
        folder: for history and spool.
        pool: stays open.
        make: the population, of the class it is given.
        real: whether the time that the pool takes is a cost of the driver.
    """
    meter = Meter()
    made: Any = make(_Population)
    made.meter = meter
    spool: Any = _Spool(folder / "spool")
    spool.meter = meter
    with _History.open(folder / "history") as history:
        history.meter = meter  # type: ignore[attr-defined]
        driver = Driver(made, history, spool, lambda: _Pool(pool, meter, real), limits)
        meter.round(begins=True)
        began = time.thread_time()
        driver.search()
        meter.cpu_seconds += time.thread_time() - began
        meter.round(begins=False)
    return meter

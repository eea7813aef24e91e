"""A pool of simulated workers in virtual time, behind the same protocol as the real ones.

The driver's own code runs against it at sizes that no test machine holds. It behaves as `cluster.pool`
does: a worker has one job at a time, and free workers get jobs inside `wait`, in the order of submission; a
worker that crashes or is killed at the time limit is replaced; such a job is started once more, before
those that were submitted later. What happens to a job follows from the seed and the job alone, never from
when or where it runs, so a simulation repeats itself exactly.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from evaluators.base import ItemPool
from search.local_pool import failed
from search.pool import Failure, Job, Outcome

ATTEMPTS = 2
"""As in `cluster.pool`, which needs Ray to be imported."""

Key = tuple[int, ItemPool]
Draw = Callable[[Random], float]
Ending = Literal["done", "crash", "timeout"]


def log_normal(mean: float, variation: float) -> Draw:
    """Log-normal durations of this mean, in seconds, and coefficient of variation."""
    sigma = math.sqrt(math.log1p(variation**2))
    return lambda chance: chance.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)


def pareto(mean: float, exponent: float) -> Draw:
    """Pareto durations of this mean, in seconds; the smaller the exponent (> 1), the heavier the tail."""
    least = mean * (exponent - 1) / exponent
    return lambda chance: least * chance.paretovariate(exponent)


@dataclass(frozen=True)
class Fates:
    """What happens to jobs.

    Attributes:
        seconds: draws how long an evaluation takes.
        seed: of all draws.
        crash: probability that an attempt takes its worker down, at a random moment.
        error: probability that an evaluation ends in an error.
    """

    seconds: Draw
    seed: int = 0
    crash: float = 0.0
    error: float = 0.0

    def of(self, job: Job, attempt: int) -> tuple[float, bool, bool]:
        """Seconds until an attempt ends, and whether it does so in a crash, and in an error."""
        chance = Random(f"{self.seed}/{job.candidate}/{job.items}")
        seconds, error = self.seconds(chance), chance.random() < self.error
        chance = Random(f"{self.seed}/{job.candidate}/{job.items}/{attempt}")
        if chance.random() < self.crash:
            return seconds * chance.random(), True, False
        return seconds, False, error


@dataclass(frozen=True)
class Stint:
    """A worker was busy with an attempt at a job, from `start` to `end`."""

    worker: int
    key: Key
    start: float
    end: float


@dataclass
class _Entry:
    order: int
    job: Job
    attempts: int = 0
    cancelled: bool = False


@dataclass(frozen=True, order=True)
class _Event:
    """Something that will happen; equal times happen in the order in which they were foreseen."""

    time: float
    number: int
    worker: int
    start: float
    ending: Ending | None
    """None: a new worker is there."""
    error: bool


class SimulatedPool:
    """Workers that only take (virtual) time.

    Args:
        workers: how many.
        fates: what happens to jobs.
        score: the outcome of a job that succeeds.
        trial_seconds: time limit of one attempt.
        replace_seconds: until a new worker is there for one that died.
        submit_seconds: virtual time that the driver takes for every job it submits, in which it does not look
            at the pool.

    Attributes:
        now: virtual time, in seconds.
        stints: all that the workers did, in the order of their ends.
        freed: how often a worker ended an evaluation.
        starved_at: when no job was queued for it then, in seconds.
        operations: events handled and jobs started: grows with the jobs, whatever the number of workers.
    """

    def __init__(
        self,
        workers: int,
        fates: Fates,
        score: Callable[[Job], Outcome],
        *,
        trial_seconds: float = math.inf,
        replace_seconds: float = 0.0,
        submit_seconds: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.stints: list[Stint] = []
        self.freed = self.operations = 0
        self.starved_at: list[float] = []
        self._workers, self._fates, self._score = workers, fates, score
        self._trial_seconds, self._replace_seconds = trial_seconds, replace_seconds
        self._submit_seconds = submit_seconds
        self._entries: dict[Key, _Entry] = {}
        self._queue: list[tuple[int, _Entry]] = []
        self._idle = list(range(workers))
        self._events: list[_Event] = []
        self._at_work: dict[int, _Entry] = {}
        self._done: list[Outcome] = []
        self._orders = self._numbers = 0
        self._closed = False

    @property
    def size(self) -> int:
        return self._workers

    @property
    def busy(self) -> int:
        return len(self._at_work)

    @property
    def starved(self) -> int:
        """How often a worker ended an evaluation and no job was queued."""
        return len(self.starved_at)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ValueError for one that is under way, or when the pool is closed."""
        if self._closed or job.key in self._entries:
            raise ValueError(f"job {job.key} was submitted twice, or the pool is closed")
        self._entries[job.key] = _Entry(self._orders, job)
        heapq.heappush(self._queue, (self._orders, self._entries[job.key]))
        self._orders += 1
        self.now += self._submit_seconds

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Outcomes that are there. If there is none, virtual time goes on until there is one.

        A timeout of 0 only looks; any other would end in one more call, so it is not simulated.
        """
        self._happen()
        while not self._done and timeout != 0 and self._events:
            self.now = max(self.now, self._events[0].time)
            self._happen()
        done, self._done = self._done, []
        return tuple(done)

    def cancel(self, key: Key) -> None:
        """Forget a job; one that runs is left to end."""
        if (entry := self._entries.pop(key, None)) is not None:
            entry.cancelled = True
        self._done = [outcome for outcome in self._done if outcome.key != key]

    def close(self) -> None:
        self._closed = True
        self._queue, self._events, self._idle = [], [], []

    def _happen(self) -> None:
        """All that is due, and then jobs for the free."""
        while self._events and self._events[0].time <= self.now:
            event = heapq.heappop(self._events)
            self.operations += 1
            if event.ending is None:
                self._idle.append(event.worker)
            else:
                self._ended(event, event.ending)
        while self._idle and self._queue:
            _, entry = heapq.heappop(self._queue)
            if not entry.cancelled:
                self._start(self._idle.pop(), entry)

    def _start(self, worker: int, entry: _Entry) -> None:
        self.operations += 1
        entry.attempts += 1
        self._at_work[worker] = entry
        seconds, crash, error = self._fates.of(entry.job, entry.attempts)
        ending: Ending = "crash" if crash else "done"
        if seconds > self._trial_seconds:
            seconds, ending = self._trial_seconds, "timeout"
        self._foresee(self.now + seconds, worker, ending, error)

    def _foresee(self, time: float, worker: int, ending: Ending | None, error: bool = False) -> None:
        heapq.heappush(self._events, _Event(time, self._numbers, worker, self.now, ending, error))
        self._numbers += 1

    def _ended(self, event: _Event, ending: Ending) -> None:
        entry = self._at_work.pop(event.worker)
        self.stints.append(Stint(event.worker, entry.job.key, event.start, event.time))
        if ending == "done":
            self._idle.append(event.worker)
            self.freed += 1
            if not self._queue:
                self.starved_at.append(event.time)
        else:
            self._foresee(event.time + self._replace_seconds, event.worker, None)
        if entry.cancelled:
            return
        name = f"simulated/{event.worker}"
        if ending == "done" and not event.error:
            outcome = self._score(entry.job)
        elif ending == "done":
            outcome = failed(entry.job, Failure("error", "a simulated error"))
        elif entry.attempts < ATTEMPTS:
            heapq.heappush(self._queue, (entry.order, entry))
            return
        else:
            outcome = failed(entry.job, Failure(ending, f"a simulated {ending}"))
        del self._entries[entry.job.key]
        took = event.time - event.start
        self._done.append(replace(outcome, worker=name, attempts=entry.attempts, evaluate_seconds=took))

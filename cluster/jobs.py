"""What was submitted and what became of it: the jobs of a pool, without the workers.

Every operation on the way of an ordinary job takes the same time however many jobs there are.
"""

from __future__ import annotations

import bisect
import itertools
import pickle
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluators.base import ItemPool
from search.local_pool import failed, one_line
from search.pool import Failure, Job, Outcome

Key = tuple[int, ItemPool]

LOOK_AHEAD = 8
"""So many jobs, or idle workers, are looked at for the pair that suits best."""


@dataclass(eq=False)
class Entry:
    """A submitted job, until its outcome is there.

    Attributes:
        message: the job as it is sent.
        attempts: how often it was started.
        lost_on: Ray's ids of the nodes on which its workers died, empty for one killed as overdue.
        left: node -> why the worker that had the job there is gone; it is tried on other nodes.
        failed_first: the outcome that is not believed before another worker has tried.
        overtaken: whether one that was submitted later was given to a worker first, because it suits it better.
        submitted: when it was, in monotonic seconds.
        circumstances: what the history tells of the last attempt: `node`, `started_at`, `queue_seconds`, `bytes_moved`,
            and `evaluate_seconds` of one that was lost, of which nobody else can tell.
    """

    order: int
    job: Job
    message: bytes
    attempts: int = 0
    lost_on: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    failed_first: Outcome | None = None
    cancelled: bool = False
    overtaken: bool = False
    submitted: float = field(default_factory=time.monotonic)
    circumstances: dict[str, Any] = field(default_factory=dict)

    def started(self, host: str) -> None:
        """Note that an attempt begins now, on that machine."""
        self.attempts += 1
        moved = self.circumstances.get("bytes_moved", 0) + len(self.message)
        self.circumstances = {
            "node": host,
            "started_at": time.time(),
            "queue_seconds": time.monotonic() - self.submitted,
            "bytes_moved": moved,
        }

    def lost(self) -> None:
        """Note that the worker of the attempt is gone: its time was spent all the same."""
        waited = time.monotonic() - self.submitted
        self.circumstances["evaluate_seconds"] = max(0.0, waited - self.circumstances["queue_seconds"])

    def returned(self, message_bytes: int) -> None:
        """Note that an answer of so many bytes came."""
        self.circumstances["bytes_moved"] += message_bytes


class JobBook:
    """Jobs that wait for a worker, those under way, and outcomes that wait to be collected."""

    def __init__(self) -> None:
        self._orders = itertools.count()
        self._open: dict[Key, Entry] = {}
        self._queue: deque[Entry] = deque()
        self._again: list[Entry] = []
        self._done: dict[Key, Outcome] = {}

    @property
    def under_way(self) -> bool:
        """Whether a job is there that has no outcome yet."""
        return bool(self._open)

    @property
    def count(self) -> int:
        """How many jobs have no outcome yet."""
        return len(self._open)

    def any_waiting(self) -> bool:
        """Whether a job waits for a worker."""
        while self._queue and self._queue[0].cancelled:
            self._queue.popleft()
        return bool(self._queue or self._again)

    @property
    def any_done(self) -> bool:
        """Whether an outcome waits to be collected."""
        return bool(self._done)

    def add(self, job: Job) -> None:
        """Queue a job; one that cannot be sent fails at once.

        Raises:
            ValueError: a job with this key is under way already or was not collected yet.
        """
        if job.key in self._open or job.key in self._done:
            raise ValueError(f"job {job.key} was submitted twice")
        try:
            message = pickle.dumps(job)
        except Exception as error:  # noqa: BLE001 - pickle raises what the object's own methods raise
            why = f"the job cannot be sent to a worker: {one_line(error)}"
            self._done[job.key] = failed(job, Failure("error", why), attempts=0)
        else:
            entry = Entry(next(self._orders), job, message)
            self._open[job.key] = entry
            self._queue.append(entry)

    def first(self) -> Entry | None:
        """The job that waits longest, of those that no worker had before."""
        return self._queue[0] if self.any_waiting() and self._queue else None

    def next_for(
        self, may_run: Callable[[Entry], bool], suits: Callable[[Sequence[int]], int] = lambda _: 0
    ) -> Entry | None:
        """The next job for a worker, taken out of the queue: those that run again first, then that of the next few
        that suits the worker best. A job is overtaken once at most, since results are recorded in order.

        Args:
            may_run: whether the worker may take a job that some worker had before.
            suits: how well the worker is prepared for a job with this prefix.
        """
        for index, entry in enumerate(self._again):
            if may_run(entry):
                return self._again.pop(index)
        if not self.any_waiting() or not self._queue:
            return None
        best, most = 0, -1
        for index, entry in enumerate(itertools.islice(self._queue, LOOK_AHEAD)):
            if not entry.cancelled and (how_well := suits(entry.job.prefix)) > most:
                best, most = index, how_well
            if entry.overtaken and not entry.cancelled:
                break
        for entry in itertools.islice(self._queue, best):
            entry.overtaken = True
        chosen = self._queue[best]
        del self._queue[best]
        return chosen

    def put_back(self, entry: Entry) -> None:
        """Queue a job again, before all that were submitted later."""
        if not entry.cancelled:
            bisect.insort(self._again, entry, key=lambda queued: queued.order)

    def withdraw(self, entry: Entry) -> bool:
        """Take a job that runs again out of the queue; returns whether it was there."""
        found = entry in self._again
        if found:
            self._again.remove(entry)
        return found

    def conclude(self, entry: Entry, outcome: Outcome) -> None:
        """The job has an outcome; dropped if nobody wants it any more."""
        if not entry.cancelled and self._open.pop(entry.job.key, None) is not None:
            self._done[entry.job.key] = outcome

    def cancel(self, key: Key) -> Entry | None:
        """Forget a job and its outcome; returns what was under way."""
        self._done.pop(key, None)
        entry = self._open.pop(key, None)
        if entry is not None:
            entry.cancelled = True
            self.withdraw(entry)
        return entry

    def take(self) -> tuple[Outcome, ...]:
        """The outcomes that wait to be collected, once."""
        done, self._done = self._done, {}
        return tuple(done.values())

    def clear(self) -> None:
        """Forget all."""
        self._open, self._done, self._again = {}, {}, []
        self._queue.clear()


@dataclass(frozen=True)
class _Suspect:
    entry: Entry
    failure: Failure
    worker: str
    due: float


class Suspects:
    """Jobs whose last worker died, while it is open whether the node died with it."""

    def __init__(self) -> None:
        self._waiting: list[_Suspect] = []

    def add(self, entry: Entry, failure: Failure, worker: str, due: float) -> None:
        """Wait until `due` (monotonic seconds) before the job counts as failed."""
        self._waiting.append(_Suspect(entry, failure, worker, due))

    def judge(self, dead: Collection[str], attempts: int, now: float) -> tuple[list[Entry], list[_Suspect]]:
        """Jobs to start again, since their worker died with its node; and those that have failed for good.

        Args:
            dead: Ray's ids of nodes that died.
            attempts: so many deaths make a failure.
            now: monotonic seconds.
        """
        again, gone, rest = [], [], []
        for suspect in self._waiting:
            entry = suspect.entry
            entry.lost_on = [node for node in entry.lost_on if node not in dead]
            if entry.cancelled:
                continue
            if len(entry.lost_on) < attempts:
                again.append(entry)
            elif suspect.due <= now:
                gone.append(suspect)
            else:
                rest.append(suspect)
        self._waiting = rest
        return again, gone

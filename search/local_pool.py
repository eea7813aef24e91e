"""The pool in this process: no Ray, no other process, one job after another.

It serves tests, debugging and small searches, and says what every pool does with the body of a
worker: how it is found, and what becomes of what it raises.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

from evaluators.base import ItemPool
from search.outcome_check import checked
from search.pool import Failure, Job, Outcome, WorkerPlan
from search.run_log import emit

DEFAULT_BODY = "search.evaluation:Evaluation"
SEVERAL_AT_ONCE = "search.batch_evaluation:BatchEvaluation"
"""For plans with several candidates in a forward pass."""


@runtime_checkable
class TakesSeveral(Protocol):
    """A body that evaluates several jobs at once."""

    def run_many(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """The outcomes of jobs, in their order; see `Body.run`."""


class Body(Protocol):
    """What a worker is made of: constructed once with the plan, then run job by job."""

    def run(self, job: Job) -> Outcome:
        """The outcome of a job. Failures of a candidate are outcomes; what is raised is a defect."""


@dataclass(frozen=True)
class Preparation:
    """How many seconds it took to construct a body, in all and for its models and evaluators.

    The rest went to the libraries that it imports.
    """

    build_seconds: float = 0.0
    model_seconds: float = 0.0
    evaluator_seconds: float = 0.0


def preparation(body: Body, seconds: float) -> Preparation:
    """What the construction of a body took, which tells the parts if it has them as attributes of those names."""
    return Preparation(seconds, *(getattr(body, part, 0.0) for part in ("model_seconds", "evaluator_seconds")))


def make_body(dotted: str, plan: WorkerPlan) -> Body:
    """The body named by `module:Class`, constructed with the plan; its errors pass through."""
    module, _, name = dotted.partition(":")
    return cast(Body, getattr(importlib.import_module(module), name)(plan))


def run_body(body: Body, job: Job) -> Outcome:
    """Run a job and return a checked outcome, whatever the body raises or returns.

    `SystemExit` is caught as well: a plug-in that calls `sys.exit` fails its candidate, not the run.
    """
    try:
        return checked(body.run(job), job)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded as the failure of this trial
        return failed(job, Failure("error", one_line(error), traceback.format_exc()))


def run_bodies(body: Body, jobs: Sequence[Job]) -> list[Outcome]:
    """Run jobs at once if the body can; see `run_body`."""
    if len(jobs) == 1 or not isinstance(body, TakesSeveral):
        return [run_body(body, job) for job in jobs]
    try:
        found = body.run_many(jobs)
        return [checked(outcome, job) for outcome, job in zip(found, jobs, strict=True)]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded as the failure of these trials
        return [failed(job, Failure("error", one_line(error), traceback.format_exc())) for job in jobs]


def failed(job: Job, failure: Failure, worker: str = "", attempts: int = 1) -> Outcome:
    """The outcome of a job that has no scores."""
    return Outcome(job.candidate, job.items, failure=failure, worker=worker, attempts=attempts)


def one_line(error: BaseException) -> str:
    """`TypeError: first line of the message`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class LocalPool:
    """Runs jobs inside `wait`, one per call or as many as the body takes at once, in the order of submission.

    An exception that must end the program (`KeyboardInterrupt`) passes through `wait`; the job it
    hit stays queued and is run again by the next call.

    Args:
        plan: what the body is constructed with, at once: its errors come out of the constructor.
        workers: what `size` says. Nothing runs in parallel; a driver that sizes its window by the
            pool makes the same history here as on as many real workers.
        body: class of the worker's body as `module:Class`.
    """

    def __init__(self, plan: WorkerPlan, workers: int = 1, body: str = DEFAULT_BODY) -> None:
        self._size = workers
        self._queue: deque[Job] = deque()
        self._submitted: dict[tuple[int, ItemPool], float] = {}
        self._running = False
        began = time.perf_counter()
        several = body == DEFAULT_BODY and plan.candidates_per_forward > 1
        self._at_once = plan.candidates_per_forward if several else 1
        self._body: Body | None = make_body(SEVERAL_AT_ONCE if several else body, plan)
        took = preparation(self._body, time.perf_counter() - began)
        emit("worker_ready", worker=f"local/{os.getpid()}", node=platform.node(), **vars(took))

    @property
    def size(self) -> int:
        """As many workers as asked for; see the class."""
        return self._size

    @property
    def busy(self) -> int:
        """1 inside a job, else 0."""
        return int(self._running)

    def ready(self) -> None:
        """Nothing to wait for: the body was made by the constructor."""

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ValueError: a job with this key is queued already, or the pool is closed.
        """
        if self._body is None:
            raise ValueError("this pool is closed")
        if any(queued.key == job.key for queued in self._queue):
            raise ValueError(f"job {job.key} was submitted twice")
        self._queue.append(job)
        self._submitted[job.key] = time.time()

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """The outcome of the next job, or jobs, run now and to their end; nothing if none is queued.

        `timeout` has no effect: a job in this process cannot be left before it ends.
        """
        if not self._queue or self._body is None:
            return ()
        jobs = list(itertools.islice(self._queue, self._at_once))
        self._running = True
        started = time.time()
        try:
            outcomes = run_bodies(self._body, jobs)
        finally:
            self._running = False
        return tuple(
            replace(
                outcome,
                worker=f"local/{os.getpid()}",
                attempts=1,
                node=platform.node(),
                started_at=started,
                queue_seconds=max(0.0, started - submitted),
                bytes_moved=0,
            )
            for job, outcome in zip(jobs, outcomes, strict=True)
            if (submitted := self._taken(job)) is not None
        )

    def _taken(self, job: Job) -> float | None:
        """When a job that has run was submitted; None for one that was cancelled by something that it called."""
        if not any(queued is job for queued in self._queue):
            return None
        self._queue.remove(job)
        return self._submitted.pop(job.key)

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        """Forget a job."""
        self._queue = deque(job for job in self._queue if job.key != key)
        self._submitted.pop(key, None)

    def close(self) -> None:
        """Let go of the body, and with it of the model."""
        self._queue.clear()
        self._body = None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

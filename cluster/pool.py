"""The pool of workers on Ray, supervised here.

Ray's own retries lose results and run candidates twice (calls queued on an actor die with it), and a
running call cannot be cancelled. So actors never restart, each has one call in flight, and this
loop does the rest: it starts a job again when its worker died, kills what is overdue, replaces the
dead, and gives up on a candidate that took two workers down. An attempt counts only if the worker was
alive when it got the job.
"""

from __future__ import annotations

import bisect
import itertools
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import handshake
from cluster.crew import (
    BUILD_SECONDS,
    CHECK_SECONDS,
    FOREVER,
    START_SECONDS,
    Crew,
    Entry,
    Slot,
    dead_nodes,
    reason,
    several_nodes,
)
from cluster.local_ray import open_session
from cluster.sending import ShardMode
from cluster.worker import Built, Greeting, StartError
from evaluators.base import ItemPool
from search.errors import UserError, WorkerError
from search.local_pool import DEFAULT_BODY, checked, failed, one_line
from search.pool import Failure, FailureKind, Job, Outcome, WorkerPlan
from search.store.copied import COPIED

ATTEMPTS = 2
"""How often a job is started whose workers die or exceed the time limit."""
START_DEATHS = 3
"""After so many workers in a row that could not start, something is wrong for good. So it is when all workers
died that often while they were idle, and none of them lived to take a job."""
MOMENT_SECONDS = 1.0
"""A worker that returned an outcome so recently gets the next job without being asked whether it is alive:
it would have nothing to do while the driver records that outcome."""
POLL_SECONDS = 0.5
"""Longest time inside Ray, so that signal handlers run."""
GATHER_SECONDS = 60.0
"""How long the first jobs wait for the handshake of workers that a busy cluster has no room for."""
NODE_DEATH_SECONDS = 20.0
"""Ray may need this long to notice that a whole node died; its jobs are not to blame for that."""


@dataclass(frozen=True)
class _Suspect:
    """A job whose last worker died, while it is open whether the node died with it."""

    entry: Entry
    failure: Failure
    worker: str
    due: float


class RayPool:
    """A supervised set of Ray actors behind the `Pool` protocol.

    The constructor starts or joins Ray and asks for the workers; they come up inside `ready` or `wait`,
    and no job is dispatched before those that the cluster can hold have shown that they run the
    driver's code. What a body's constructor raises as `MeiosisError` is raised there as it is.

    Args:
        plan: what the body of every worker is constructed with.
        workers: how many; more than the cluster holds start as nodes join.
        working_folder: existing folder of the run; `ray.log` in it takes what Ray prints.
        address: `host:port` of a Ray cluster to join; None: start Ray on this machine, or use the one
            that this process has.
        trial_seconds: time limit of one attempt at a job; None: none. What operators prepare once per node
            falls into the first attempts that use them.
        gpus_per_worker: GPUs that each worker gets, may be a fraction.
        shards: how workers get at models and data: `auto`, `shared` or `copy`, see `cluster.sending.Sender`.
        body: class of the worker's body as `module:Class`.
        report: called with one line when something about the workers is worth telling.

    Raises:
        UserError: impossible arguments.
        WorkerError: Ray cannot be started or joined, or no node can hold a worker.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        *,
        workers: int,
        working_folder: Path,
        address: str | None = None,
        trial_seconds: float | None = None,
        gpus_per_worker: float = 0.0,
        shards: ShardMode = "auto",
        body: str = DEFAULT_BODY,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if workers < 1:
            raise UserError(f"cluster.workers is {workers}, expected at least 1")
        if trial_seconds is not None and trial_seconds <= 0:
            raise UserError(f"cluster.trial_seconds is {trial_seconds:g}, expected more than 0")
        self._report = report or (lambda line: None)
        self._workers = workers
        self._trial_seconds = FOREVER if trial_seconds is None else trial_seconds
        self._orders = itertools.count()
        self._queue: list[Entry] = []
        self._suspects: list[_Suspect] = []
        self._done: list[Outcome] = []
        self._slots: list[Slot] = []
        self._start_deaths = self._idle_deaths = self._expected = 0
        self._gathered = self._all_up = self._closed = False
        self._report("starting Ray" if address is None else f"joining Ray at {address}")
        self._session = open_session(
            address,
            cpus=min(workers, os.cpu_count() or 1),
            with_gpus=gpus_per_worker > 0,
            log=working_folder / "ray.log",
        )
        try:
            self._crew = Crew(self._session, plan, body, gpus_per_worker, workers, shards, working_folder / COPIED)
            if address is not None:
                self._report("usage statistics stay as the head of the cluster has them")
            if self._crew.room < workers:
                self._report(f"there is room for {self._crew.room} of {workers} workers until nodes join")
            now = time.monotonic()
            self._gather_until = FOREVER if self._session.own else now + GATHER_SECONDS
            for _ in range(workers):
                self._slots.append(self._crew.hire(now))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers the pool keeps: those asked for, dead ones being replaced."""
        return self._workers

    @property
    def busy(self) -> int:
        """How many of them have a job."""
        return sum(slot.entry is not None for slot in self._slots)

    def ready(self) -> None:
        """Wait until the workers that the cluster can hold are up.

        Raises:
            MeiosisError: what the body's constructor raised.
            WorkerError: a worker runs other code, or none can be kept alive.
        """
        while not self._gather() or self._up() < self._expected:
            self._step(POLL_SECONDS)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ValueError: a job with this key is under way already or was not collected yet, or the pool is closed.
        """
        if self._closed:
            raise ValueError("this pool is closed")
        if job.key in {*(entry.job.key for entry in self._under_way()), *(outcome.key for outcome in self._done)}:
            raise ValueError(f"job {job.key} was submitted twice")
        try:
            message = pickle.dumps(job)
        except Exception as error:  # noqa: BLE001 - pickle raises what the object's own methods raise
            why = f"the job cannot be sent to a worker: {one_line(error)}"
            self._done.append(failed(job, Failure("error", why), attempts=0))
        else:
            self._queue.append(Entry(next(self._orders), job, message))

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Outcomes that are there, see `Pool.wait`; at once and empty if no job is under way.

        Raises:
            MeiosisError: what the body's constructor raised.
            WorkerError: a worker runs other code, or none can be kept alive.
        """
        end = FOREVER if timeout is None else time.monotonic() + timeout
        while not self._done and self._under_way():
            self._step(max(0.0, min(POLL_SECONDS, end - time.monotonic())))
            if time.monotonic() >= end:
                break
        done, self._done = self._done, []
        return tuple(done)

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        """Forget a job. One that runs is left to end, and its outcome is dropped."""
        for entry in self._under_way():
            if entry.job.key == key:
                entry.cancelled = True
        self._queue = [entry for entry in self._queue if not entry.cancelled]
        self._suspects = [suspect for suspect in self._suspects if not suspect.entry.cancelled]
        self._done = [outcome for outcome in self._done if outcome.key != key]

    def close(self) -> None:
        """Kill the workers, and end Ray if this pool started it."""
        if self._closed:
            return
        self._closed = True
        for slot in self._slots:
            slot.kill()
        self._slots, self._queue, self._suspects = [], [], []
        if hasattr(self, "_crew"):
            self._tell(self._crew.sender.close())
        self._session.close()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _under_way(self) -> list[Entry]:
        working = [slot.entry for slot in self._slots if slot.entry is not None]
        entries = [*self._queue, *(suspect.entry for suspect in self._suspects), *working]
        return [entry for entry in entries if not entry.cancelled]

    def _tell(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._report(line)

    def _up(self) -> int:
        return sum(slot.phase in ("idle", "checking", "working") for slot in self._slots)

    def _gather(self) -> bool:
        """Whether jobs may start: every worker there is room for has passed the handshake."""
        if not self._gathered:
            greeted = sum(slot.phase != "starting" for slot in self._slots)
            self._gathered = greeted >= self._crew.room
            self._expected = greeted
            if not self._gathered and time.monotonic() > self._gather_until:
                self._gather_until += GATHER_SECONDS
                self._gathered = greeted > 0
                self._report(f"the cluster is busy: it has room for {greeted} of {self._workers} workers now")
        return self._gathered

    def _step(self, seconds: float) -> None:
        """Hand out jobs, wait up to `seconds` for workers, deal with what came and with what did not."""
        import ray

        self._tell(self._crew.sender.news())
        self._dispatch()
        calls = {slot.call: slot for slot in self._slots if slot.call is not None}
        if calls:
            arrived, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
            if arrived:
                arrived, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in arrived:
                self._arrived(calls[call])
        else:
            time.sleep(seconds)
        now = time.monotonic()
        for slot in [slot for slot in self._slots if slot.deadline < now]:
            limits = {"starting": START_SECONDS, "building": BUILD_SECONDS, "checking": CHECK_SECONDS}
            limit = limits.get(slot.phase, self._trial_seconds)
            self._lost(slot, f"not done after {limit:g} s", "timeout")
        self._judge_suspects()
        self._dispatch()

    def _dispatch(self) -> None:
        """Give the next jobs to idle workers, in the order of submission."""
        if not self._queue or not self._gather():
            return
        for slot in [slot for slot in self._slots if slot.phase == "idle"][: len(self._queue)]:
            slot.entry = self._queue.pop(0)
            now = time.monotonic()
            if now - slot.seen < MOMENT_SECONDS:
                self._start(slot, slot.entry)
            else:
                slot.phase, slot.deadline, slot.call = "checking", now + CHECK_SECONDS, slot.actor.check.remote()

    def _start(self, slot: Slot, entry: Entry) -> None:
        entry.attempts += 1
        slot.phase, slot.deadline = "working", time.monotonic() + self._trial_seconds
        slot.call = slot.actor.run.remote(entry.message)

    def _arrived(self, slot: Slot) -> None:
        """Take what a worker's call returned, and move the worker on."""
        import ray

        try:
            message = pickle.loads(ray.get(slot.call))  # noqa: S301 - written by our own worker
        except ray.exceptions.OutOfMemoryError:
            self._lost(slot, "Ray ended it because its node ran out of memory", "out_of_memory")
            return
        except Exception as error:  # noqa: BLE001 - becomes the failure of the trial, or of the start
            # What the worker's code raised, as where our packages are missing, and scores whose classes this
            # process cannot read are errors. All else that Ray raises means that the process, its node or
            # the result that lay on that node is gone.
            died = isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)
            self._lost(slot, reason(error), "crash" if died else "error")
            return
        if slot.phase == "starting":
            assert isinstance(message, Greeting)
            handshake.compare(self._crew.identity, message.identity, slot.name)
            slot.node, slot.name = message.node_id, f"{slot.name}/{message.pid}"
            self._crew.build(slot, time.monotonic())
        elif slot.phase == "building":
            assert isinstance(message, Built | StartError)
            self._built(slot, message)
        elif slot.entry is not None and slot.phase == "checking" and not slot.entry.cancelled:
            self._idle_deaths = 0
            self._start(slot, slot.entry)
        elif slot.entry is not None:
            if slot.phase == "working":
                self._finish(slot.entry, message, slot.name)
                slot.seen = time.monotonic()
            slot.phase, slot.call, slot.entry, slot.deadline = "idle", None, None, FOREVER

    def _built(self, slot: Slot, message: Built | StartError) -> None:
        if isinstance(message, Built):
            handshake.compare_evaluators(self._crew.evaluators, message.evaluators, slot.name, message.node)
            slot.phase, slot.call, slot.deadline = "idle", None, FOREVER
            self._start_deaths = 0
            if not self._all_up:
                self._all_up = self._up() == self._workers
                self._report(f"worker {self._up()}/{self._workers} ready")
        elif message.explained is not None:
            raise message.explained
        else:
            self._lost(slot, message.message, "error", message.detail)

    def _finish(self, entry: Entry, outcome: object, worker: str) -> None:
        if entry.cancelled:
            return
        try:
            outcome = checked(outcome, entry.job)
        except (TypeError, ValueError) as error:
            self._fail(entry, Failure("error", one_line(error)), worker)
        else:
            self._done.append(replace(outcome, worker=worker, attempts=entry.attempts))

    def _fail(self, entry: Entry, failure: Failure, worker: str) -> None:
        self._done.append(failed(entry.job, failure, worker, entry.attempts))

    def _lost(self, slot: Slot, why: str, kind: FailureKind, detail: str = "") -> None:
        """A worker is gone, or must go: replace it, and see what becomes of its job."""
        slot.kill()
        if slot.phase == "checking":
            self._idle_deaths += 1
            self._stop_after(self._idle_deaths, START_DEATHS * self._workers, "died before they got a job", why)
        elif slot.entry is None:
            self._start_deaths += 1
            self._stop_after(self._start_deaths, START_DEATHS, "could not start", why, detail)
        if slot.entry is not None and not slot.entry.cancelled:
            if slot.phase == "checking":
                self._put_back(slot.entry)
            else:
                self._retry_or_fail(slot.entry, slot, why, kind)
        self._slots[self._slots.index(slot)] = self._crew.hire(time.monotonic())
        self._report(f"{slot.name} is replaced: {why}")

    def _stop_after(self, deaths: int, most: int, what: str, why: str, detail: str = "") -> None:
        if deaths >= most:
            error = WorkerError(f"{most} workers in a row {what}; the last one: {why}")
            if detail:
                error.add_note(detail)
            raise error

    def _put_back(self, entry: Entry) -> None:
        """Queue a job again, at its old place."""
        bisect.insort(self._queue, entry, key=lambda queued: queued.order)

    def _retry_or_fail(self, entry: Entry, slot: Slot, why: str, kind: FailureKind) -> None:
        entry.lost_on.append("" if kind == "timeout" else slot.node)
        if kind == "error":
            self._fail(entry, Failure(kind, why), slot.name)
        elif len(entry.lost_on) < ATTEMPTS:
            self._put_back(entry)
        else:
            failure = Failure(kind, f"took down {len(entry.lost_on)} workers, the last time: {why}")
            wait = NODE_DEATH_SECONDS if several_nodes() and any(entry.lost_on) else 0.0
            self._suspects.append(_Suspect(entry, failure, slot.name, time.monotonic() + wait))

    def _judge_suspects(self) -> None:
        """Start a job again whose worker died with its node; fail it when that cannot be any more."""
        if not self._suspects:
            return
        dead = dead_nodes()
        for suspect in list(self._suspects):
            entry = suspect.entry
            entry.lost_on = [node for node in entry.lost_on if node not in dead]
            if len(entry.lost_on) < ATTEMPTS:
                self._put_back(entry)
            elif suspect.due <= time.monotonic():
                self._fail(entry, suspect.failure, suspect.worker)
            else:
                continue
            self._suspects.remove(suspect)

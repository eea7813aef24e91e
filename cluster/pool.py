"""The pool of workers on Ray, supervised here.

Ray's own retries lose results and run candidates twice (calls queued on an actor die with it), and a
running call cannot be cancelled. So actors never restart, each has one call in flight, and a loop of ours does
the rest (`cluster.supervisor`): it starts a job again when its worker died, on another node where there is one,
kills what is overdue, replaces the dead and those whose trials keep failing (`cluster.doubts`), keeps away from
nodes that are about to go or whose workers keep dying (`cluster.nodes`), and gives up on a candidate that took
two workers down. An attempt counts only if the worker was alive when it got the job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.calls import FOREVER, Calls
from cluster.crew import Crew, check_gpus
from cluster.jobs import JobBook
from cluster.local_ray import open_session
from cluster.metrics import PoolMetrics
from cluster.sending import ShardMode
from cluster.sharing import Sharing, open_sharing
from cluster.supervisor import MOMENT_SECONDS, Supervisor
from evaluators.base import ItemPool
from search.errors import UserError
from search.local_pool import DEFAULT_BODY
from search.outcome_check import OutcomeCheck
from search.pool import Job, Outcome, WorkerPlan
from search.progress import Progress
from search.store.copied import COPIED

__all__ = ["MOMENT_SECONDS", "RayPool"]

POLL_SECONDS = 0.5
"""Longest time inside Ray, so that signal handlers run."""


class RayPool:
    """A supervised set of Ray actors behind the `Pool` protocol.

    The constructor starts or joins Ray and asks for the workers; they come up inside `ready` or `wait`,
    and no job is dispatched before those that the cluster can hold have shown that they run the
    driver's code. What a body's constructor raises as `MeiosisError` is raised there as it is, until the first job
    has started; a worker that comes later and cannot be used is replaced, and its node set aside when that goes on. On
    a cluster with other runs there are as many workers as its share, see `cluster.sharing`.

    Args:
        plan: what the body of every worker is constructed with.
        workers: the most there are at a time; more than the cluster holds start as nodes join.
        working_folder: existing folder inside that of the run; `ray.log` in it takes what Ray prints,
            `nodes.json` tells which nodes have how many workers, and which get none and why, `copied.jsonl` which
            got copies of models and data.
        address: `host:port` of a Ray cluster to join; None: start Ray on this machine, or use the one
            that this process has.
        trial_seconds: time limit of one attempt at a job; None: none. What operators prepare once per node
            falls into the first attempts that use them.
        gpus_per_worker: GPUs that each worker gets: a fraction of one, or a whole number. Several are on one node.
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
        check_gpus(gpus_per_worker)
        tell = report or (lambda line: None)
        self._workers, self._closed = workers, False
        self._jobs = JobBook()
        self._supervisor: Supervisor | None = None
        self._sharing: Sharing | None = None
        tell("starting Ray" if address is None else f"joining Ray at {address}")
        self._session = open_session(
            address,
            cpus=min(workers, os.cpu_count() or 1),
            with_gpus=gpus_per_worker > 0,
            log=working_folder / "ray.log",
        )
        try:
            calls = Calls()
            notes = working_folder / COPIED
            crew = Crew(self._session, calls, plan, body, gpus_per_worker, workers, shards, notes)
            if address is not None:
                tell("usage statistics stay as the head of the cluster has them")
                if not self._session.asks_for_token:
                    tell(
                        "warning: this cluster asks for no token, so whoever reaches its ports runs code on its nodes; "
                        "to switch it on, start its nodes with RAY_AUTH_MODE=token (see 'The token' in docs/cluster.md)"
                    )
            if crew.room < workers:
                tell(f"there is room for {crew.room} of {workers} workers until nodes join")
            run = working_folder.resolve().parent
            self._metrics = PoolMetrics(run.name, str(run.parent))
            self._sharing = open_sharing(crew.need, workers, run.name, tell, alone=self._session.own)
            self._supervisor = Supervisor(
                crew,
                calls,
                self._jobs,
                # Another body than ours, in a test, say, need not score what the evaluators would.
                OutcomeCheck(plan.evaluators if body == DEFAULT_BODY else (), plan.seed),
                self._sharing,
                workers=workers,
                trial_seconds=FOREVER if trial_seconds is None else trial_seconds,
                patient=self._session.own,
                folder=working_folder,
                report=tell,
            )
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers the pool keeps, dead ones being replaced: those asked for, or its share of a cluster."""
        return self._supervisor.size if self._supervisor is not None else self._workers

    @property
    def busy(self) -> int:
        """How many of them have a job."""
        return self._supervisor.busy if self._supervisor is not None else 0

    def ready(self) -> None:
        """Wait until the workers that the cluster can hold are up.

        Raises:
            MeiosisError: what the body's constructor raised before the first job started.
            WorkerError: a worker runs other code, before the first job started, or none can be kept alive.
        """
        while self._supervisor is not None and not self._supervisor.ready:
            self._supervisor.step(POLL_SECONDS)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ValueError: a job with this key is under way already or was not collected yet, or the pool is closed.
        """
        if self._closed:
            raise ValueError("this pool is closed")
        self._jobs.add(job)

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Outcomes that are there, see `Pool.wait`; at once and empty if no job is under way.

        Raises:
            MeiosisError: what the body's constructor raised before the first job started.
            WorkerError: a worker runs other code, before the first job started, or none can be kept alive.
        """
        end = FOREVER if timeout is None else time.monotonic() + timeout
        while self._supervisor is not None and not self._jobs.any_done and self._jobs.under_way:
            self._supervisor.step(max(0.0, min(POLL_SECONDS, end - time.monotonic())))
            if time.monotonic() >= end:
                break
        done = self._jobs.take()
        self._metrics.count(done)
        return done

    def publish(self, progress: Progress) -> None:
        """Show the state of the run in the metrics of Ray."""
        self._metrics.show(progress)

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        """Forget a job. One that runs is left to end, and its outcome is dropped."""
        entry = self._jobs.cancel(key)
        if entry is not None and self._supervisor is not None:
            self._supervisor.cancelled(entry)

    def close(self) -> None:
        """Kill the workers, and end Ray if this pool started it."""
        if self._closed:
            return
        self._closed = True
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None
        if self._sharing is not None:
            self._sharing.close()
        self._jobs.clear()
        self._session.close()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

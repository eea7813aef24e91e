"""The workers of a pool, moved from phase to phase: started, given jobs, ended and replaced.

What is remembered of jobs, calls, nodes and failures is in modules of their own. Nothing on the way of an ordinary
job takes longer with more workers.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster import handshake
from cluster.calls import FOREVER, Calls
from cluster.crew import BUILD_SECONDS, START_SECONDS, Crew, reason
from cluster.doubts import FAILURES_IN_A_ROW, Doubts
from cluster.jobs import LOOK_AHEAD, Entry, JobBook, Suspects
from cluster.messages import Alive, Built, Greeting, Message, StartError, decode
from cluster.nodes import NodeBook, is_placed, node_of
from cluster.sharing import Sharing
from cluster.slot import Phase, Slot
from cluster.start_deaths import StartDeath, StartDeaths
from search.errors import MeiosisError, WorkerError
from search.local_pool import failed, one_line
from search.outcome_check import OutcomeCheck, cleaned
from search.pool import Failure, FailureKind, Outcome
from search.run_log import emit

ATTEMPTS = 2
"""How often a job is started whose workers die or exceed the time limit."""
START_DEATHS = 3
"""After so many workers in a row that could not start, something is wrong for good, see `cluster.start_deaths`. So
it is when all workers died that often while they were idle, and none of them lived to take a job."""
CHECK_SECONDS = 60.0
"""Time for an idle worker to answer; its machine may be busy with swapping."""
MOMENT_SECONDS = 1.0
"""A worker that returned an outcome so recently gets the next job without being asked whether it is alive:
it would have nothing to do while the driver records that outcome."""
NODES_SECONDS = 1.0
"""So often the nodes are looked at."""
GATHER_SECONDS = 60.0
"""How long the first jobs wait for the handshake of workers that a busy cluster has no room for."""
NODE_DEATH_SECONDS = 20.0
"""Ray may need this long to notice that a whole node died; its jobs are not to blame for that."""
_EXPECTED: dict[Phase, tuple[type[Message], ...]] = {
    "starting": (Greeting,),
    "building": (Built, StartError),
    "checking": (Alive,),
}
"""What a worker may say now; else, an outcome."""


class Supervisor:
    """Keeps workers at work on the jobs of a book.

    Args:
        crew, calls: where workers come from, and the calls to them.
        jobs: what there is to do; outcomes are written into it.
        check: what outcomes are checked with.
        sharing: how many workers there may be beside those of other runs.
        workers: how many workers there shall be.
        trial_seconds: time limit of one attempt at a job.
        patient: whether the first jobs wait for all workers that there is room for, however long they take.
        folder: the pool's, for `nodes.json`.
        report: called with one line when something about the workers is worth telling.
    """

    def __init__(
        self,
        crew: Crew,
        calls: Calls,
        jobs: JobBook,
        check: OutcomeCheck,
        sharing: Sharing,
        *,
        workers: int,
        trial_seconds: float,
        patient: bool,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self._crew, self._calls, self._jobs, self._check, self._sharing = crew, calls, jobs, check, sharing
        self._workers, self._trial_seconds, self._folder, self._report = workers, trial_seconds, folder, report
        self._suspects, self._doubts = Suspects(), Doubts()
        self._nodes = NodeBook(crew.need, workers, report)
        self._avoided = self._nodes.avoided
        self._slots: dict[int, Slot] = {}
        self._up: set[Slot] = set()
        self._engaged: set[Slot] = set()
        self._idle: deque[Slot] = deque()
        self._greeted = self._idle_deaths = self._expected = 0
        self._start_deaths = StartDeaths()
        self._gathered = self._all_up = self._begun = self._headless = False
        self._layouts: list[Mapping[str, Any]] = []
        now = time.monotonic()
        self._next_look = now
        self._gather_until = FOREVER if patient else now + GATHER_SECONDS
        self._fit(now)

    @property
    def busy(self) -> int:
        """How many workers have a job."""
        return len(self._engaged)

    @property
    def size(self) -> int:
        """How many workers are kept; beside other runs the share of this one, or those at work if they are more."""
        return max(self._sharing.fair, self.busy)

    @property
    def ready(self) -> bool:
        """Whether the workers that there was room for at the start are up."""
        return self._gather() and len(self._up) >= min(self._expected, self._sharing.fair)

    def step(self, seconds: float) -> None:
        """Hand out jobs, wait up to `seconds` for workers, deal with what came and with what did not."""
        self._dispatch()
        for slot, ref in self._calls.returned(seconds):
            self._arrived(slot, ref)
        now = time.monotonic()
        for slot in self._calls.overdue(now):
            limits = {"starting": START_SECONDS, "building": BUILD_SECONDS, "checking": CHECK_SECONDS}
            limit = limits.get(slot.phase, self._trial_seconds)
            self._lost(slot, f"not done after {limit:g} s", "timeout")
        if now >= self._next_look:
            self._next_look = now + NODES_SECONDS
            self._look(now)
        self._dispatch()

    def cancelled(self, entry: Entry) -> None:
        """A job is not wanted any more. One that runs is left to end."""
        self._trust(self._doubts.settle(entry))

    def close(self) -> None:
        """Kill the workers."""
        self._nodes.write(self._folder, self._sharing.now)
        for slot in self._slots.values():
            self._calls.drop(slot)
            slot.kill()
        self._slots.clear()
        self._up.clear()
        self._engaged.clear()
        self._tell(self._crew.sender.close())

    def _tell(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._report(line)

    def _gather(self) -> bool:
        """Whether jobs may start: every worker there is room for has passed the handshake."""
        if not self._gathered:
            greeted = self._greeted
            wanted = min(self._sharing.fair, self._nodes.room)
            self._gathered = greeted >= max(1, wanted)
            self._expected = greeted
            if not self._gathered and time.monotonic() > self._gather_until:
                self._gather_until += GATHER_SECONDS
                self._gathered = greeted > 0
                placed = greeted + self._placed()
                if placed < wanted:  # else they have room, and still copy models, say
                    self._report(f"the cluster is busy: it has room for {placed} of {self._workers} workers now")
        return self._gathered

    def _placed(self) -> int:
        """How many workers have got room on a node, and did not greet yet: they copy models, say."""
        return sum(slot.phase == "starting" and is_placed(slot.actor) for slot in self._slots.values())

    def _look(self, now: float) -> None:
        """What is done once a second: see how the nodes are, and what follows from it."""
        if self._is_headless():
            return
        self._tell(self._crew.sender.news())
        self._nodes.refresh(now)
        self._fit(now)
        avoided = self._nodes.avoided | self._sharing.full
        if avoided != self._avoided:
            self._avoided = avoided
            for slot in list(self._slots.values()):
                unplaced = slot.phase == "starting" and slot.avoid - avoided and not is_placed(slot.actor)
                leaves = slot.node in self._nodes.avoided and slot.phase in ("building", "idle", "doubted")
                if unplaced or leaves:
                    self._replace(slot)
        self._give_up_on_starts(now)
        again, gone = self._suspects.judge(self._nodes.dead, ATTEMPTS, now)
        for entry in again:
            self._jobs.put_back(entry)
        for suspect in gone:
            self._conclude(suspect.entry, failed(suspect.entry.job, suspect.failure), suspect.worker)
        if len(self._doubts) and len(self._doubts) == len(self._up):  # nobody is there to ask
            for entry in self._doubts.entries():
                if entry.failed_first is not None and self._jobs.withdraw(entry):
                    self._conclude(entry, entry.failed_first, entry.failed_first.worker)
        self._nodes.write(self._folder, self._sharing.now)

    def _is_headless(self) -> bool:
        """Whether the head of the cluster does not answer; told once. Trials go on as long as Ray lets them."""
        silent = self._crew.silent_head
        if silent is not None and not self._headless:
            self._report(
                f"the head of the Ray cluster at {silent} does not answer; if it stays away, Ray ends this process "
                "after a minute, and 'meiosis resume' goes on elsewhere with what is saved"
            )
        elif silent is None and self._headless:
            self._report("the head of the Ray cluster answers again")
        self._headless = silent is not None
        return self._headless

    def _fit(self, now: float) -> None:
        """Have as many workers as this run may have beside others."""
        coming = self._placed() if self._sharing.below else 0
        nodes = self._nodes
        self._sharing.look(now, self._jobs.count, nodes.capacity, nodes.avoided, nodes.held, coming)
        for slot in reversed(list(self._slots.values())):
            if slot.phase == "starting" and len(self._slots) > self._sharing.allowed:
                self._end(slot)
        for slot in reversed(list(self._slots.values())):
            if slot.phase in ("building", "idle", "doubted") and self._sharing.must_go(slot.node, len(self._slots)):
                self._let_go(slot)
        while len(self._slots) < self._sharing.allowed:
            self._hire(now)

    def _dispatch(self) -> None:
        """Give the next jobs to idle workers, in the order of submission."""
        if not self._idle or not self._jobs.any_waiting() or not self._gather():
            return
        for _ in range(len(self._idle)):
            slot = self._next_idle()
            if slot.phase != "idle":  # replaced since
                continue
            entry = self._jobs.next_for(partial(self._may_run, slot), slot.recent.shared)
            if entry is None:
                self._idle.append(slot)
                if not self._jobs.any_waiting():
                    return
                continue
            slot.entry = entry
            self._engaged.add(slot)
            now = time.monotonic()
            if now - slot.seen < MOMENT_SECONDS:
                self._start(slot, entry)
            else:
                slot.phase = "checking"
                self._calls.send(slot, slot.actor.check.remote(), now + CHECK_SECONDS)

    def _next_idle(self) -> Slot:
        """Of the workers that have waited longest, the one that keeps most of what the next job begins with."""
        entry = self._jobs.first() if len(self._idle) > 1 else None
        best = 0
        if entry is not None and entry.job.prefix:
            some = list(itertools.islice(self._idle, LOOK_AHEAD))
            best = max(range(len(some)), key=lambda index: (some[index].recent.shared(entry.job.prefix), -index))
        slot = self._idle[best]
        del self._idle[best]
        return slot

    def _may_run(self, slot: Slot, entry: Entry) -> bool:
        """Whether a worker may have a job that was given to others: not where it was lost, if there is a choice."""
        if self._doubts.asker(entry) is slot:
            return False
        return slot.node not in entry.left or not self._nodes.others(entry.left)

    def _start(self, slot: Slot, entry: Entry) -> None:
        self._begun = True
        entry.started(slot.host)
        slot.recent.add(entry.job.prefix)
        slot.phase = "working"
        self._calls.send(slot, slot.actor.run.remote(entry.message), time.monotonic() + self._trial_seconds)

    def _arrived(self, slot: Slot, ref: Any) -> None:
        """Take what a worker's call returned, and move the worker on."""
        import ray

        try:
            data = ray.get(ref)
            message = decode(data, *_EXPECTED.get(slot.phase, (Outcome,)))
        except ray.exceptions.OutOfMemoryError:
            self._lost(slot, "Ray ended it because its node ran out of memory", "out_of_memory")
            return
        except Exception as error:  # noqa: BLE001 - becomes the failure of the trial, or of the start
            # What the worker's code raised, as where our packages are missing, and what is no message of it are
            # errors. All else that Ray raises means that the process, its node or
            # the result that lay on that node is gone.
            died = isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)
            self._lost(slot, reason(error), "crash" if died else "error")
            return
        if isinstance(message, Greeting):
            self._greeting(slot, message)
        elif isinstance(message, Built | StartError):
            self._built(slot, message)
        elif slot.entry is not None and slot.phase == "checking":
            self._idle_deaths = 0
            if slot.entry.cancelled:
                self._rest(slot)
            elif slot.node in self._nodes.avoided:
                self._jobs.put_back(slot.entry)
                self._rest(slot)
            else:
                self._start(slot, slot.entry)
        elif slot.entry is not None:
            entry, slot.entry, slot.seen = slot.entry, None, time.monotonic()
            entry.returned(len(data))
            self._finish(slot, entry, message)
            if slot.phase == "working":
                self._rest(slot)
            self._engaged.discard(slot)

    def _greeting(self, slot: Slot, message: Greeting) -> None:
        slot.node, slot.host, slot.late = message.node_id, message.identity.node, self._begun
        try:
            handshake.compare(self._crew.identity, message.identity, slot.name)
        except WorkerError as error:
            self._refuse(slot, error)
            return
        slot.name = f"{slot.name}/{message.pid}"
        slot.phase = "building"
        self._greeted += 1
        slot.greeted_at, slot.hello_seconds = time.time(), message.seconds
        self._nodes.arrived(slot)
        if slot.node in self._nodes.avoided:
            self._replace(slot)
        else:
            self._crew.build(slot, time.monotonic())

    def _built(self, slot: Slot, message: Built | StartError) -> None:
        if isinstance(message, Built):
            try:
                handshake.compare_evaluators(self._crew.evaluators, message.evaluators, slot.name, message.node)
            except WorkerError as error:
                self._refuse(slot, error)
                return
            self._up.add(slot)
            self._nodes.now_up()
            self._rest(slot)
            self._start_deaths.clear()
            greeted = {"hello_seconds": slot.hello_seconds, "greeted_at": slot.greeted_at}
            emit("worker_ready", worker=slot.name, node=slot.host, **greeted, **vars(message.took))
            if message.layout is not None and message.layout not in self._layouts:
                self._layouts.append(message.layout)  # told once, since workers on equal GPUs have equal ones
                emit("layout", worker=slot.name, node=slot.host, **message.layout)
            if slot.up and not self._all_up:
                self._all_up = len(self._up) == self._workers
                self._report(f"worker {len(self._up)}/{self._workers} ready")
        elif message.explained is not None:
            self._refuse(slot, message.explained)
        else:
            self._lost(slot, message.message, "error", message.detail)

    def _refuse(self, slot: Slot, error: MeiosisError) -> None:
        """A worker cannot be used, for a reason to tell the user. Before the first trial that ends the run.

        Later it is a fault of its node, which joined without being like the others, or whose disk is full, say: the
        search goes on with those that it has.
        """
        if not slot.late:
            raise error
        self._lost(slot, str(error), "error", explained=error)

    def _rest(self, slot: Slot) -> None:
        """The worker has nothing to do; on a node that is to be left it ends."""
        slot.phase, slot.entry = "idle", None
        self._engaged.discard(slot)
        if slot.node in self._nodes.avoided:
            self._replace(slot)
        elif self._sharing.must_go(slot.node, len(self._slots)):
            self._let_go(slot)
        else:
            self._idle.append(slot)

    def _finish(self, slot: Slot, entry: Entry, message: object) -> None:
        """A worker returned what became of a job."""
        if entry.cancelled:
            return
        try:
            outcome = self._check.check(message, entry.job)
        except (TypeError, ValueError) as error:
            outcome = failed(entry.job, Failure("error", one_line(error)))
        if outcome.failure is None:
            self._doubts.succeeded(slot)
        elif self._doubts.failed(slot, entry.job.candidate) and entry.failed_first is None and len(self._up) > 1:
            entry.failed_first = replace(outcome, worker=slot.name)
            self._doubts.wait(slot, entry)
            self._jobs.put_back(entry)
            return
        for node, why in entry.left.items():
            if node != slot.node:  # it can be run, so what happened there was not its doing
                self._nodes.blame(node, why, time.monotonic())
        self._conclude(entry, outcome, slot.name)

    def _conclude(self, entry: Entry, outcome: Outcome, worker: str) -> None:
        """A job has its outcome."""
        doubted = self._doubts.settle(entry)
        if doubted is not None and outcome.failure is None:
            why = f"{FAILURES_IN_A_ROW} candidates in a row failed on it, and the last of them not on {worker}"
            self._nodes.blame(doubted.node, why, time.monotonic())
            self._replace(doubted, why, "error")
        else:
            self._trust(doubted)
        failure = outcome.failure and cleaned(outcome.failure)
        outcome = replace(outcome, failure=failure, worker=worker, attempts=entry.attempts, **entry.circumstances)
        self._jobs.conclude(entry, outcome)

    def _trust(self, doubted: Slot | None) -> None:
        """A worker whose failures were those of its candidates goes on."""
        if doubted is not None:
            doubted.failed.clear()
            self._rest(doubted)

    def _lost(
        self, slot: Slot, why: str, kind: FailureKind, detail: str = "", explained: MeiosisError | None = None
    ) -> None:
        """A worker is gone, or must go: replace it, and see what becomes of its job."""
        entry, phase, now = slot.entry, slot.phase, time.monotonic()
        slot.node = slot.node or node_of(slot.actor)
        set_aside = entry is None or phase == "checking"
        set_aside = set_aside and self._nodes.blame(slot.node, why, now)
        if phase == "checking":
            self._idle_deaths += 1
            self._stop_after(self._idle_deaths, START_DEATHS * self._workers, "died before they got a job", why)
        elif set_aside:
            self._start_deaths.clear()
        elif entry is None:
            node_may_be_dead = kind == "crash" and slot.node and self._nodes.several
            due = now + NODE_DEATH_SECONDS if node_may_be_dead else now
            self._start_deaths.add(StartDeath(slot.node, why, detail, due, explained))
            self._give_up_on_starts(now)
        self._replace(slot, why, kind)
        if entry is not None and not entry.cancelled:
            if phase == "checking":
                self._jobs.put_back(entry)
            else:
                self._retry_or_fail(entry, slot, why, kind)

    def _replace(self, slot: Slot, why: str = "", kind: FailureKind = "error") -> None:
        """End a worker and hire another; with a reason it counts as dead, without one it leaves its node."""
        if why:
            emit("worker_lost", "warning", worker=slot.name, node=slot.host, kind=kind, why=why)
            self._report(f"{slot.name} is replaced: {why}")
        elif slot.up:
            self._report(f"{slot.name} moves away from {self._nodes.name(slot.node)}")
        self._end(slot, died=bool(why))
        if len(self._slots) < self._sharing.allowed:
            self._hire(time.monotonic())

    def _let_go(self, slot: Slot) -> None:
        """End a worker that has no trial for the sake of other runs; a place elsewhere is taken at the next look."""
        emit("worker_released", worker=slot.name, node=slot.host)
        self._sharing.went(slot.node, time.monotonic())
        self._end(slot)

    def _end(self, slot: Slot, *, died: bool = False) -> None:
        self._nodes.left(slot, died=died)
        self._greeted -= slot.phase != "starting"
        self._calls.drop(slot)
        slot.kill()
        slot.entry = None
        self._up.discard(slot)
        self._engaged.discard(slot)
        del self._slots[slot.number]

    def _hire(self, now: float) -> None:
        slot = self._crew.hire(now, self._nodes.avoided | self._sharing.full)
        self._slots[slot.number] = slot

    def _give_up_on_starts(self, now: float) -> None:
        if deaths := self._start_deaths.counted(self._nodes.dead, now, others_work=bool(self._up)):
            if len(deaths) >= START_DEATHS and deaths[-1].explained is not None:
                raise deaths[-1].explained
            self._stop_after(len(deaths), START_DEATHS, "could not start", deaths[-1].why, deaths[-1].detail)

    def _stop_after(self, deaths: int, most: int, what: str, why: str, detail: str = "") -> None:
        if deaths >= most:
            error = WorkerError(f"{most} workers in a row {what}; the last one: {why}")
            if detail:
                error.add_note(detail)
            raise error

    def _retry_or_fail(self, entry: Entry, slot: Slot, why: str, kind: FailureKind) -> None:
        entry.lost()
        entry.lost_on.append("" if kind == "timeout" else slot.node)
        entry.left[slot.node] = why
        if kind == "error":
            self._conclude(entry, failed(entry.job, Failure(kind, why)), slot.name)
        elif len(entry.lost_on) < ATTEMPTS:
            self._jobs.put_back(entry)
        else:
            failure = Failure(kind, f"took down {len(entry.lost_on)} workers, the last time: {why}")
            if self._nodes.several and any(entry.lost_on):
                self._suspects.add(entry, failure, slot.name, time.monotonic() + NODE_DEATH_SECONDS)
            else:
                self._conclude(entry, failed(entry.job, failure), slot.name)

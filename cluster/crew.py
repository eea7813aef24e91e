"""Where workers come from: how many a cluster holds, what they are told, and how one is started."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster import handshake
from cluster.local_ray import Session
from cluster.sending import Sender, ShardMode
from cluster.shards import shard_refs
from cluster.worker import THREAD_VARIABLES, Surroundings, actor_class
from search.errors import WorkerError
from search.local_pool import one_line
from search.pool import Job, WorkerPlan

START_SECONDS = 300.0
"""Time for a worker's process to come up, where it does not have to wait for room."""
CHECK_SECONDS = 60.0
"""Time for an idle worker to answer; its machine may be busy with swapping."""
BUILD_SECONDS = 900.0
"""Time for a worker to load its models and evaluators."""
FOREVER = float("inf")


@dataclass(eq=False)
class Entry:
    """A submitted job, until its outcome is there.

    Attributes:
        message: the job as it is sent.
        attempts: how often it was started.
        lost_on: Ray's ids of the nodes on which its workers died, empty for one killed as overdue.
    """

    order: int
    job: Job
    message: bytes
    attempts: int = 0
    lost_on: list[str] = field(default_factory=list)
    cancelled: bool = False


@dataclass(eq=False)
class Slot:
    """A worker. `call` is the one call in flight; at `deadline` (monotonic seconds) it is killed.

    `checking` is the phase between idle and working: a job waits until the worker answers, so that one that
    died while it was idle does not count against the job. `seen` is when it returned its last outcome.
    """

    name: str
    actor: Any
    call: Any
    deadline: float
    phase: Literal["starting", "building", "idle", "checking", "working"] = "starting"
    seen: float = -FOREVER
    node: str = ""
    entry: Entry | None = None

    def kill(self) -> None:
        """End the worker's process, whatever it does."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # gone already
            ray.kill(self.actor, no_restart=True)


class Crew:
    """Starts workers for one plan.

    Args:
        session: Ray, connected.
        gpus: GPUs per worker.
        wanted: how many workers there shall be.
        shards: how workers get at models and data, see `Sender`.
        notes: file that is told what was copied.

    Raises:
        CheckpointError: a model of the plan is not what it was when the plan was made.
        WorkerError: no node of the cluster can hold a worker.
    """

    def __init__(
        self,
        session: Session,
        plan: WorkerPlan,
        body: str,
        gpus: float,
        wanted: int,
        shards: ShardMode = "auto",
        notes: Path | None = None,
    ) -> None:
        import ray

        # On a cluster a worker reserves its threads; on this machine the number that the user gave counts.
        self._session, cpus = session, 0 if session.own else plan.threads
        self.room = _room(cpus, gpus, wanted)
        if self.room == 0:
            raise WorkerError(
                f"no node of the Ray cluster can hold a worker: it needs {cpus} CPU and {gpus:g} GPU, "
                f"and the largest node has {_largest('CPU'):g} CPU, that with most GPUs {_largest('GPU'):g}"
            )
        self.identity = handshake.identity()
        self.evaluators = handshake.evaluator_sources(plan.evaluators)
        self._setup = pickle.dumps((body, plan))
        refs = shard_refs(plan.models, plan.base)
        self.sender = Sender(plan, refs, shards, own=session.own, identity=self.identity, notes=notes)
        self._surroundings = vars(
            Surroundings(
                packages=handshake.locations(),
                driver_path=tuple(os.path.abspath(entry or os.curdir) for entry in sys.path),
                added_path=session.added_path,
                folder=os.path.abspath(os.curdir),
                environment=dict.fromkeys(THREAD_VARIABLES, str(plan.threads)),
            )
        )
        self._class = ray.remote(actor_class()).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._numbers = itertools.count(1)

    def hire(self, now: float) -> Slot:
        """A new worker, on its way; its first call returns a `Greeting`."""
        actor = self._class.remote()
        deadline = now + START_SECONDS if self._session.own else FOREVER  # on a cluster it may wait for room
        call = actor.hello.remote(self._surroundings, self.sender.offer, self.sender.handle)
        return Slot(f"worker-{next(self._numbers)}", actor, call, deadline)

    def build(self, slot: Slot, now: float) -> None:
        """Let a worker construct its body; the call returns `Built` or a `StartError`."""
        slot.phase, slot.deadline = "building", now + BUILD_SECONDS
        slot.call = slot.actor.build.remote(self._setup)


def dead_nodes() -> set[str]:
    """Ray's ids of nodes that were there once."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def several_nodes() -> bool:
    """Whether a node can die and leave work behind."""
    import ray

    return len(ray.nodes()) > 1


def reason(error: BaseException) -> str:
    """Why a call of a worker failed, in one line, out of Ray's page of text."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return one_line(cause)
    import ray

    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it does not answer any more"
    if isinstance(error, ray.exceptions.ObjectLostError):
        return "its result was lost with the node that held it"
    text = str(error)
    if "unexpectedly exits with a connection error" in text:
        return "its process died: killed, out of memory, or crashed"
    detail = re.search(r"Worker exit detail: (.+?)(?:\. |\n|$)", text)
    return detail.group(1) if detail else one_line(error)


def _alive() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _largest(resource: str) -> float:
    return max((have.get(resource, 0.0) for have in _alive()), default=0.0)


def _room(cpus: float, gpus: float, wanted: int) -> int:
    """How many workers, at most those wanted, the cluster holds while nothing else runs on it."""

    def fits(have: dict[str, float]) -> int:
        needs = [(have.get("CPU", 0.0), cpus), (have.get("GPU", 0.0), gpus)]
        # Half of 1 GPU, thrice a third: a little more than there is must still count as there.
        return min((int(there / need + 1e-6) for there, need in needs if need > 0), default=wanted)

    return min(wanted, sum(fits(have) for have in _alive()))

"""Where workers come from: how many a cluster holds, what they are told, and how one is started."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

from cluster import handshake
from cluster.calls import FOREVER, Calls
from cluster.local_ray import Session
from cluster.need import Need
from cluster.sending import Sender, ShardMode
from cluster.shards import shard_refs
from cluster.slot import Slot
from cluster.worker import THREAD_VARIABLES, Surroundings, actor_class
from search.cluster_config import can_be_reserved
from search.errors import UserError, WorkerError
from search.local_pool import one_line
from search.outcome_check import LINE_CHARACTERS, printable
from search.pool import WorkerPlan

START_SECONDS = 300.0
"""Time for a worker's process to come up, where it does not have to wait for room."""
BUILD_SECONDS = 3600.0
"""Time for a worker to load its models and evaluators."""


def check_gpus(gpus: float) -> None:
    """Raise `UserError` for a number of GPUs that Ray cannot reserve for one worker."""
    if not can_be_reserved(gpus):
        raise UserError(
            f"cluster.gpus_per_worker is {gpus:g}, expected a fraction of one GPU, or a whole number of GPUs: "
            "a worker shares one GPU with others, or has some for itself"
        )


class Crew:
    """Starts workers for one plan.

    Ray chooses the node: a worker for which there is no room waits for it, which is also what makes an
    autoscaler add nodes. A worker with several GPUs is put into a placement group of its own.

    Args:
        session: Ray, connected.
        calls: takes the calls that are made here.
        gpus: GPUs per worker, see `check_gpus`.
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
        calls: Calls,
        plan: WorkerPlan,
        body: str,
        gpus: float,
        wanted: int,
        shards: ShardMode = "auto",
        notes: Path | None = None,
    ) -> None:
        import ray

        # On a cluster a worker reserves its threads; on this machine the number that the user gave counts.
        self._session, self._calls = session, calls
        self.need = Need(0 if session.own else plan.threads, gpus)
        """What is reserved for each worker."""
        self.room = min(wanted, sum(self.need.fits(have, wanted) for have in _alive()))
        """How many workers, at most those wanted, the cluster holds while nothing else runs on it."""
        if self.room == 0:
            raise WorkerError(
                f"no node of the Ray cluster can hold a worker: it needs {self.need}, "
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
        self._class = ray.remote(max_restarts=0, max_task_retries=0)(actor_class())
        self._numbers = itertools.count(1)

    @property
    def silent_head(self) -> str | None:
        """Address of the head of the cluster if it does not answer, else None."""
        return None if self._session.head_answers() else self._session.address

    def hire(self, now: float, avoid: frozenset[str] = frozenset()) -> Slot:
        """A new worker, on its way; its first call returns a `Greeting`. It is placed on no node in `avoid`."""
        options: dict[str, Any] = {"num_cpus": self.need.cpus, "num_gpus": self.need.gpus}
        labels = {"ray.io/node-id": f"!in({', '.join(sorted(avoid))})"} if avoid else {}
        group = None
        if self.need.gpus > 1:
            group, options["scheduling_strategy"] = self._reserve(labels)
        else:
            options |= {"scheduling_strategy": "SPREAD", "label_selector": labels}
        actor = self._class.options(**options).remote()
        number = next(self._numbers)
        slot = Slot(number, f"worker-{number}", actor, group, avoid)
        deadline = now + START_SECONDS if self._session.own else FOREVER  # on a cluster it may wait for room
        call = actor.hello.remote(self._surroundings, self.sender.offer, self.sender.handle)
        self._calls.send(slot, call, deadline)
        return slot

    def build(self, slot: Slot, now: float) -> None:
        """Let a worker construct its body; the call returns `Built` or a `StartError`."""
        slot.phase = "building"
        self._calls.send(slot, slot.actor.build.remote(self._setup), now + BUILD_SECONDS)

    def _reserve(self, labels: dict[str, str]) -> tuple[Any, Any]:
        """A placement group on one node for one worker, and the strategy that puts the worker there."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = {"GPU": self.need.gpus, **({"CPU": float(self.need.cpus)} if self.need.cpus else {})}
        group = placement_group([needs], strategy="STRICT_PACK", bundle_label_selector=[labels] if labels else None)
        return group, PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)


def reason(error: BaseException) -> str:
    """Why a call of a worker failed, in one line, out of Ray's page of text."""
    return printable(_reason(error)[:LINE_CHARACTERS])


def _reason(error: BaseException) -> str:
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

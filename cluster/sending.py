"""The driver's side of copying: an actor on its node that reads pieces of the files that were offered.

A piece at a time is asked for by a node that lacks a file, a few pieces ahead, and goes through the object store: so
neither side ever holds more than these pieces, whatever the size of a model. When the process of the actor dies, Ray
starts it again and repeats what was asked.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.handshake import Identity
from cluster.parcels import Offer, Parcel, parcels_of
from cluster.shards import ShardRef
from search.memory_sizes import gib
from search.outcome_check import printable
from search.pool import WorkerPlan
from search.store.copied import Copied, note_copied

ShardMode = Literal["auto", "shared", "copy"]

RESTARTS = 10
"""How often Ray starts the actor again."""
CLOSE_SECONDS = 5.0
READERS = 4
"""Pieces that are read at the same time."""
_EVENTS: dict[str, dict[str, type]] = {
    "began": {"what": str},
    "going on": {"percent": int},
    "ended": {"moved": int, "seconds": float, "folder": str},
}
"""What a node says of its copying, and the parts of it that are not always there."""


def source_class() -> Any:
    """The class of the actor, to be given to `ray.remote`.

    Defined inside a function and made of the standard library alone, as `cluster.worker.actor_class` is, and for
    the same reason: sent by value, it imports nothing of ours.
    """

    class MeiosisSource:
        """Reads pieces of certain files and of no other.

        Args:
            files: key of a parcel and name of a file in it -> path, size and time of change in nanoseconds.
        """

        def __init__(self, files: dict[tuple[str, str], tuple[str, int, int]]) -> None:
            import threading

            self._files = files
            self._told: list[dict[str, Any]] = []
            self._lock = threading.Lock()

        def read(self, key: str, name: str, offset: int, length: int) -> bytes | str:
            """A piece of a file, or in words why there is none."""
            import os

            if (key, name) not in self._files:
                return f"{name} was not offered"
            path, size, mtime_ns = self._files[key, name]
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                return f"{path} cannot be read on the driver's node ({error.strerror})"
            try:
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                    return f"{path} was changed since the search began; start it again"
                piece = os.pread(descriptor, length, offset)
                while len(piece) < length:
                    more = os.pread(descriptor, length - len(piece), offset + len(piece))
                    if not more:
                        return f"{path} became shorter while it was read; start the search again"
                    piece += more
                return piece
            except OSError as error:
                return f"{path} cannot be read on the driver's node ({error.strerror})"
            finally:
                os.close(descriptor)

        def tell(self, event: dict[str, Any]) -> None:
            """Keep what a node says until the driver asks."""
            with self._lock:
                self._told.append(event)

        def news(self) -> list[dict[str, Any]]:
            """What nodes said since this was called last."""
            with self._lock:
                told, self._told = self._told, []
            return told

    return MeiosisSource


def files_of(parcels: tuple[Parcel, ...]) -> dict[tuple[str, str], tuple[str, int, int]]:
    """What the actor is constructed with."""
    return {
        (parcel.key, file.name): (str(parcel.file_at(Path(parcel.path), file)), file.size, file.mtime_ns)
        for parcel in parcels
        for file in parcel.files
    }


class Sender:
    """Offers the files of a plan to workers, and tells what was copied where.

    Args:
        shards: references to the models.
        mode: `shared`: nothing is copied; `copy`: workers of all nodes get copies; `auto`: those that do not see
            the same files get them. On this machine, without a cluster, `auto` is `shared`.
        own: whether Ray is our own, on this machine alone.
        identity: what the driver runs.
        notes: file that takes a line for every node that got copies; None: none.

    Raises:
        UserError: a file is missing.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        shards: Mapping[str, ShardRef],
        mode: ShardMode,
        *,
        own: bool,
        identity: Identity,
        notes: Path | None = None,
    ) -> None:
        copies = mode == "copy" or (mode == "auto" and not own)
        parcels = parcels_of(plan, shards) if copies else ()
        self.offer = pickle.dumps(Offer(dict(shards), identity, parcels, mode == "copy"))
        self.handle: Any = None
        self._notes, self._asked = notes, None
        if parcels:
            self.handle = _start(parcels)

    def news(self, seconds: float = 0.0) -> list[str]:
        """Lines about copying since the last call, after waiting at most `seconds` for them."""
        if self.handle is None:
            return []
        import ray

        if self._asked is None:
            self._asked = self.handle.news.remote()
        ready, _ = ray.wait([self._asked], timeout=seconds)
        if not ready:
            return []
        asked, self._asked = self._asked, None
        try:
            events = ray.get(asked)
        except ray.exceptions.RayError:  # it is being started again; nodes that need it will say so
            return []
        return [printable(self._line(event)) for event in events if _is_event(event)]

    def close(self) -> list[str]:
        """End the actor; returns what was not told yet."""
        if self.handle is None:
            return []
        import ray

        lines = []
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            lines = self.news(CLOSE_SECONDS)
            if self._asked is None:  # that may have been the answer to a question of a second ago
                lines += self.news(CLOSE_SECONDS)
            ray.kill(self.handle, no_restart=True)
        self.handle = None
        return lines

    def _line(self, event: dict[str, Any]) -> str:
        where, total = f"node {event['node']}", gib(event["total"])
        if event["state"] == "began":
            return f"{where}: copying {event['what']} ({total}) from the driver's node"
        if event["state"] == "going on":
            return f"{where}: copied {event['percent']} % of {total}"
        copied = Copied(event["node"], event["node_id"], event["moved"], event["seconds"], event["folder"])
        if self._notes is not None:
            note_copied(self._notes, copied)
        return f"{where}: copied {gib(copied.nbytes)} in {copied.seconds:.1f} s to {copied.folder}, kept for later runs"


def _is_event(event: object) -> bool:
    """Whether this is what `cluster.receiving` says of its copying; what else a node says is dropped."""
    if not isinstance(event, dict) or not isinstance(event.get("state"), str) or event["state"] not in _EVENTS:
        return False
    kinds = {"node": str, "node_id": str, "total": int} | _EVENTS[event["state"]]
    return all(type(event.get(name)) is kind for name, kind in kinds.items())


def _start(parcels: tuple[Parcel, ...]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(source_class())
        .options(
            num_cpus=0,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=READERS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(files_of(parcels))
    )

"""A worker's side of copying: where its models and data are on this node, fetched if they are not here.

Of all workers of a node one fetches and the others wait for it. What was cut off goes on where it stopped.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.copies import Copies
from cluster.parcels import Offer, Parcel, ParcelFile, difference, this_node
from cluster.shards import attach
from evaluators.base import EvaluatorSpec
from search.checkpoints.reading import Checkpoint
from search.errors import WorkerError
from search.memory_sizes import gib
from search.pool import WorkerPlan
from search.store.atomic import sync_folder, write_all

PIECE_BYTES = 1 << 22
PIECES_AHEAD = 3
"""Pieces that are under way to a node: with the size of one, the memory that copying takes on either side."""
PIECE_SECONDS = 120.0
"""Time for one piece; so long a silence means that the driver's node is gone."""
REPORT_SECONDS = 5.0
"""Time between two lines about one node."""
TRIES = 3
"""How often a transfer that broke off is taken up again."""


class LostError(Exception):
    """A piece did not come, but might if it is asked for again."""


class Channel(Protocol):
    """The way to the files of the driver's node."""

    def ask(self, parcel: Parcel, file: ParcelFile, offset: int, length: int) -> Any:
        """Ask for a piece; what is returned is given to `take`."""

    def take(self, asked: Any) -> bytes | str:
        """The piece, or in words why it cannot be had. Raises `LostError`."""

    def tell(self, event: Mapping[str, Any]) -> None:
        """Say how the copying goes."""


class ActorChannel:
    """The way to the actor of `cluster.sending`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def ask(self, parcel: Parcel, file: ParcelFile, offset: int, length: int) -> Any:
        return self._actor.read.remote(parcel.key, file.name, offset, length)

    def take(self, asked: Any) -> bytes | str:
        import ray

        try:
            piece: bytes | str = ray.get(asked, timeout=PIECE_SECONDS)
        except ray.exceptions.RayError as error:
            raise LostError(str(error).strip().partition("\n")[0]) from error
        return piece

    def tell(self, event: Mapping[str, Any]) -> None:
        import ray

        try:
            ray.get(self._actor.tell.remote(dict(event)), timeout=PIECE_SECONDS)
        except ray.exceptions.RayError:  # nothing depends on it
            return


@dataclass(frozen=True)
class Located:
    """Where the files of a plan are on this node.

    Attributes:
        checkpoints: model name -> checkpoint.
        moved: path on the driver's node -> path here, where they differ.
        copies: holds the locks of the copies that are used, as long as this lives.
    """

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    copies: Copies | None = None

    def plan(self, plan: WorkerPlan) -> WorkerPlan:
        """The plan with the paths of this node."""
        if not self.moved:
            return plan
        models = {}
        for name, ref in plan.models.items():
            folder = str(self.checkpoints[name].folder)
            models[name] = ref.model_copy(update={"path": folder, "statistics": self._here(ref.statistics)})
        evaluators = tuple(
            EvaluatorSpec(spec.name, spec.use, {key: self._here(value) for key, value in spec.options.items()})
            for spec in plan.evaluators
        )
        return replace(plan, models=models, evaluators=evaluators)

    def _here(self, value: Any) -> Any:
        """Plain data with the paths of this node; a path may end in `:name` of a function."""
        if isinstance(value, str):
            path, colon, name = value.rpartition(":")
            return self.moved.get(value) or (f"{self.moved[path]}:{name}" if colon and path in self.moved else value)
        if isinstance(value, Path):
            return Path(self._here(str(value)))
        if isinstance(value, Mapping):
            return {key: self._here(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._here(part) for part in value)
        return value


def locate(offer: Offer, channel: Channel | None, copies: Copies | None = None, node_id: str = "") -> Located:
    """Find the files on this node, or get them.

    Args:
        channel: the way to the driver's node; None: nothing is copied.
        copies: the copies of this node, by default those of `Copies()`.
        node_id: Ray's id of this node, for what is told.

    Raises:
        WorkerError: models that differ and are not copied, a full disk, or files that are not those of the start.
    """
    moved: dict[str, str] = {}
    lacking: list[Parcel] = []
    if channel is not None:
        lacking = [p for p in offer.parcels if offer.always or difference(p, Path(p.path)) is not None]
    if channel is not None and lacking:
        copies = copies or Copies()
        with copies.alone():
            _fetch(lacking, channel, copies, node_id)
        moved = {parcel.path: str(copies.place(parcel)) for parcel in lacking}
    here = {name: replace(ref, folder=moved.get(ref.folder, ref.folder)) for name, ref in offer.shards.items()}
    return Located(attach(here), moved, copies)


def _fetch(parcels: Sequence[Parcel], channel: Channel, copies: Copies, node_id: str) -> None:
    """Get what is not there yet, and hold on to all. Only inside `copies.alone`."""
    missing = []
    for parcel in parcels:
        if difference(parcel, copies.place(parcel)) is None:
            copies.use(parcel)
        else:
            missing.append(parcel)
    if not missing:
        return
    partials = {parcel.key: copies.partial(parcel).parent for parcel in missing}
    there = sum(_size_of(partial) for partial in partials.values())
    total = sum(parcel.nbytes for parcel in missing)
    copies.make_room(total - there, keep=[partial.name for partial in partials.values()])
    report = _Report(channel, node_id, missing[0].what, total, len(missing))
    for parcel in missing:
        try:
            _receive(parcel, channel, copies, report)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                shutil.rmtree(partials[parcel.key], ignore_errors=True)  # a full disk harms more than us
            raise WorkerError(
                f"{this_node()}: {copies.folder}: {parcel.what} cannot be copied there ({error.strerror}); it takes "
                f"{gib(parcel.nbytes)}: make room, or set MEIOSIS_CACHE on this node to a folder on a larger disk"
            ) from error
        copies.use(parcel)
    report.ended(copies.folder)


class _Report:
    """Says how much of all files of a node is there."""

    def __init__(self, channel: Channel, node_id: str, what: str, total: int, parcels: int) -> None:
        self._channel, self._total = channel, total
        self._started = self._told = time.monotonic()
        self._facts = {"node": this_node().removeprefix("node "), "node_id": node_id, "total": total}
        self.moved = self.done = 0
        more = f" and {parcels - 1} more" if parcels > 1 else ""
        channel.tell({**self._facts, "state": "began", "what": what + more})

    def advance(self, nbytes: int, *, moved: bool) -> None:
        self.done += nbytes
        self.moved += nbytes if moved else 0
        percent = min(100, 100 * self.done // max(1, self._total))
        now = time.monotonic()
        if percent < 100 and now - self._told >= REPORT_SECONDS:
            self._told = now
            self._channel.tell({**self._facts, "state": "going on", "percent": percent})

    def ended(self, folder: Path) -> None:
        seconds = time.monotonic() - self._started
        end = {"state": "ended", "moved": self.moved, "seconds": seconds, "folder": str(folder)}
        self._channel.tell({**self._facts, **end})


def _receive(parcel: Parcel, channel: Channel, copies: Copies, report: _Report) -> None:
    """Make one copy, from what there is of it."""
    place = copies.partial(parcel)
    lost: LostError | None = None
    for _ in range(TRIES):
        resumed = place.parent.exists()
        (place if parcel.folder else place.parent).mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            for file in parcel.files:
                _receive_file(parcel, file, parcel.file_at(place, file), channel, report)
        except LostError as error:
            lost = error
            continue
        wrong = difference(parcel, place, by_content=True)
        if wrong is None:
            copies.publish(parcel)
            sync_folder(copies.folder)
            return
        shutil.rmtree(place.parent, ignore_errors=True)
        if not resumed:
            raise WorkerError(f"{this_node()}: {parcel.what}: what came from the driver is damaged: {wrong}; try again")
    if lost is not None:
        raise WorkerError(
            f"{this_node()}: {parcel.what}: the driver's node does not send it any more ({lost}); go on with the run "
            "when that node is well: what came is kept"
        ) from lost
    raise WorkerError(f"{this_node()}: {parcel.what}: its copy was damaged {TRIES} times; check the disk of this node")


def _receive_file(parcel: Parcel, file: ParcelFile, target: Path, channel: Channel, report: _Report) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        have = os.fstat(descriptor).st_size
        written = file.size if have == file.size else have // PIECE_BYTES * PIECE_BYTES if have < file.size else 0
        os.ftruncate(descriptor, written)
        report.advance(written, moved=False)
        asked: deque[tuple[Any, int]] = deque()
        ahead = written
        while written < file.size:
            while ahead < file.size and len(asked) < PIECES_AHEAD:
                length = min(PIECE_BYTES, file.size - ahead)
                asked.append((channel.ask(parcel, file, ahead, length), length))
                ahead += length
            ticket, length = asked.popleft()
            piece = channel.take(ticket)
            del ticket  # so that the object store is rid of it
            if isinstance(piece, str):
                raise WorkerError(f"{this_node()}: {parcel.what} is not here and cannot be copied: {piece}")
            if len(piece) != length:
                raise LostError(f"a piece of {length} bytes came with {len(piece)}")
            write_all(descriptor, piece, written)
            written += length
            report.advance(length, moved=True)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.utime(target, ns=(file.mtime_ns, file.mtime_ns))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

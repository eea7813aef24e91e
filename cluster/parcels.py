"""What workers read from disk, as the driver has it: models, their statistics, the data of evaluators.

Plain data that travels to workers, so that a node can tell whether it sees the same files, and what it lacks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.handshake import Identity
from cluster.shards import ShardRef, one_at_a_time, shard_ref
from evaluators.registry import make_evaluator
from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.header import header_sha256, read_header
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.errors import CheckpointError, WorkerError
from search.pool import WorkerPlan

BESIDE_WEIGHTS = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
"""Suffixes of what a model folder has beside its weights: config, tokenizer, chat template. Never a pickle."""


@dataclass(frozen=True)
class ParcelFile:
    """One file.

    Attributes:
        name: path inside the parcel, with slashes.
        sha256: of the content; of weights, which the hash of all tensors covers, that of the header.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str
    weights: bool = False


@dataclass(frozen=True)
class Parcel:
    """Files that belong together: a folder, or a single file.

    Attributes:
        what: for people, such as `model 'code'`.
        path: absolute, on the driver's node.
        folder: whether `path` is a folder.
        tensors_sha256: content hash of the weights; empty where there are none.
    """

    what: str
    path: str
    kind: Literal["model", "statistics", "data"]
    folder: bool
    files: tuple[ParcelFile, ...]
    tensors_sha256: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def key(self) -> str:
        """Hash of the content and of all names, 32 hex digits."""
        files = [[file.name, file.size, file.sha256] for file in self.files]
        facts = [self.kind, Path(self.path).name, self.tensors_sha256, files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def file_at(self, place: Path, file: ParcelFile) -> Path:
        """Where a file is, if the parcel is at `place`."""
        return place / file.name if self.folder else place


@dataclass(frozen=True)
class Offer:
    """What every worker is told about files.

    Attributes:
        shards: model name -> reference.
        parcels: what a worker whose node lacks it may get from the driver's; empty: nothing is copied.
        always: whether it gets copies also of what it sees.
        driver: what the driver runs; nothing is copied for a worker that will be refused.
    """

    shards: Mapping[str, ShardRef]
    driver: Identity
    parcels: tuple[Parcel, ...] = ()
    always: bool = False


def parcels_of(plan: WorkerPlan, shards: Mapping[str, ShardRef]) -> tuple[Parcel, ...]:
    """All that the workers of a plan read.

    Costs a pass over the data of evaluators, none over weights that were hashed before.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    found = [_model(name, shard) for name, shard in shards.items()]
    for name, ref in plan.models.items():
        if ref.statistics is not None:
            found.append(_statistics(name, Path(ref.statistics).absolute()))
    for spec in plan.evaluators:
        found += [_data(f"data of evaluator '{spec.name}'", path.absolute()) for path in make_evaluator(spec).files()]
    return tuple({parcel.path: parcel for parcel in found}.values())


def difference(parcel: Parcel, place: Path, *, by_content: bool = False) -> str | None:
    """What is other at `place` than the driver has; None if it is the same.

    Files with the times of the driver's are not read, unless `by_content` asks for it. Weights are hashed by one
    process of this node at a time, which the others learn from.
    """
    try:
        newer = by_content
        for file in parcel.files:
            path = parcel.file_at(place, file)
            status = path.stat()
            if status.st_size != file.size:
                return f"{path} has {status.st_size} bytes, expected {file.size}"
            other_time = status.st_mtime_ns != file.mtime_ns
            newer = newer or (file.weights and other_time)
            if file.weights and header_sha256(path) != file.sha256:
                return f"{path} has another header"
            if not file.weights and (by_content or other_time) and _sha256(path) != file.sha256:
                return f"{path} has another content"
        if parcel.kind == "data" and parcel.folder and _names(place) != {file.name for file in parcel.files}:
            return f"{place} has other files"
        if parcel.tensors_sha256 and newer:
            with one_at_a_time(place):
                found = fingerprint(_weights_at(parcel, place), cache=not by_content).sha256
            if found != parcel.tensors_sha256:
                return f"the weights in {place} hash to {found[:12]}, expected {parcel.tensors_sha256[:12]}"
    except OSError as error:
        return f"{error.filename or place}: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    return None


def _weights_at(parcel: Parcel, place: Path) -> Checkpoint:
    return open_checkpoint(place) if parcel.kind == "model" else _as_checkpoint(place)


def _as_checkpoint(file: Path) -> Checkpoint:
    """A file of tensors, to be hashed like a model."""
    return Checkpoint(file.parent, {}, read_header(file))


def _model(name: str, shard: ShardRef) -> Parcel:
    folder = Path(shard.folder)
    weights = [ParcelFile(file.name, file.size, file.mtime_ns, file.header_sha256, True) for file in shard.files]
    names = sorted(path.name for path in folder.iterdir() if path.suffix in BESIDE_WEIGHTS and path.is_file())
    beside = _files(f"model '{name}'", folder, [name for name in names if not name.startswith(".")])
    return Parcel(f"model '{name}'", str(folder), "model", True, (*beside, *weights), shard.sha256)


def _statistics(name: str, file: Path) -> Parcel:
    checkpoint = _as_checkpoint(file)
    shard = shard_ref(checkpoint, fingerprint(checkpoint))
    files = tuple(ParcelFile(one.name, one.size, one.mtime_ns, one.header_sha256, True) for one in shard.files)
    return Parcel(f"statistics of '{name}'", str(file), "statistics", False, files, shard.sha256)


def _data(what: str, path: Path) -> Parcel:
    if path.is_dir():
        return Parcel(what, str(path), "data", True, _files(what, path, sorted(_names(path))))
    return Parcel(what, str(path), "data", False, _files(what, path.parent, [path.name]))


def _names(folder: Path) -> set[str]:
    """The files below a folder, but for hidden ones."""
    found = set()
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found |= {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    return found


def _files(what: str, folder: Path, names: Iterable[str]) -> tuple[ParcelFile, ...]:
    found = []
    for name in names:
        path = folder / name
        try:
            status = path.stat()
            found.append(ParcelFile(name, status.st_size, status.st_mtime_ns, _sha256(path)))
        except OSError as error:
            raise WorkerError(
                f"{what}: {path}: cannot be read ({error.strerror}); keep the files in place while a search runs"
            ) from error
    return tuple(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def this_node() -> str:
    """How messages begin that concern one node."""
    return f"node {socket.gethostname()}"

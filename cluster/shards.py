"""Shards: the source models as every worker of a node shares them.

The driver sends names, folders and hashes; a worker opens the files itself and maps them, so that
all workers of a node share the pages and one more worker costs no memory for the sources. One
process per node reads them into the page cache ahead of the first merge.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from search.checkpoints.byte_progress import ByteProgress
from search.checkpoints.fingerprint import Fingerprint, fingerprint
from search.checkpoints.header import header_sha256
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.errors import CheckpointError, WorkerError
from search.recipe import ModelRef
from search.sources import open_models

MADV_POPULATE_READ = 22
"""Reads the pages of a mapping now, with large reads (Linux 5.14); Python has no name for it yet."""

STEP_BYTES = 1 << 22
"""Warmed at once. Python's lock is held meanwhile, so this is also how long other threads wait."""

FRESH_SECONDS = 900.0
"""How long files count as warm. Later the kernel may have dropped them, and warming them again is cheap."""


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file, as the driver saw it."""

    name: str
    size: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True)
class ShardRef:
    """A checkpoint as plain data that travels to workers.

    Attributes:
        folder: absolute path, the same on every node.
        sha256: content hash of the tensors, see `search.checkpoints.fingerprint`.
    """

    folder: str
    sha256: str
    files: tuple[ShardFile, ...]


def shard_refs(models: Mapping[str, ModelRef], base: str | None = None) -> dict[str, ShardRef]:
    """References to the models of a plan, as they are on the disk of the driver now.

    An adapter's reference stands for the adapter alone; `base` names the model that it is applied to.

    Costs no pass over bytes that were hashed before (see `search.checkpoints.fingerprint_cache`).

    Raises:
        CheckpointError: a model is missing or damaged, or is not the one that was hashed for the plan.
    """
    refs = {}
    for name, checkpoint in open_models(models, base=base).items():
        model, found = models[name], fingerprint(checkpoint).sha256
        own = replace(checkpoint, base=None)
        ref = shard_ref(own, fingerprint(own))
        if model.sha256 not in (None, found):
            raise CheckpointError(
                f"model '{name}': the weights in {ref.folder} hash to {found[:12]}, expected "
                f"{str(model.sha256)[:12]}: they were changed since the search began; start it again"
            )
        refs[name] = ref
    return refs


def shard_ref(checkpoint: Checkpoint, fingerprint: Fingerprint) -> ShardRef:
    """What a worker needs to find a checkpoint and to know it again.

    Raises:
        CheckpointError: a file is gone or was damaged since it was opened.
    """
    files = []
    for file in checkpoint.files:
        try:
            status = file.stat()
            files.append(ShardFile(file.name, status.st_size, status.st_mtime_ns, header_sha256(file)))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); put it back") from error
    return ShardRef(str(checkpoint.folder), fingerprint.sha256, tuple(files))


def attach(refs: Mapping[str, ShardRef]) -> dict[str, Checkpoint]:
    """The checkpoints on this node, after checking that they are those that the driver saw.

    Size and header must be equal. A file with another modification time may be a copy, so its whole
    content is hashed (once per node, see `search.checkpoints.fingerprint_cache`).

    Raises:
        WorkerError: a file is missing, damaged or different on this node.
    """
    return {name: _attach(name, ref) for name, ref in refs.items()}


def _attach(name: str, ref: ShardRef) -> Checkpoint:
    here = f"node {socket.gethostname()}: model '{name}'"
    if not Path(ref.folder).is_dir():
        raise WorkerError(
            f"{here}: no folder {ref.folder}, which the driver has; put the models where all nodes see them"
        )
    try:
        checkpoint = open_checkpoint(Path(ref.folder))
        seen = {file.name: file for file in shard_ref(checkpoint, Fingerprint(ref.sha256, ())).files}
        expected = {file.name: file for file in ref.files}
        for file in sorted(seen.keys() ^ expected.keys()):
            where = "the driver" if file in seen else "this node"
            raise WorkerError(f"{here}: {Path(ref.folder, file)} is missing on {where}; copy the model anew")
        for file, theirs in expected.items():
            ours = seen[file]
            if (ours.size, ours.header_sha256) != (theirs.size, theirs.header_sha256):
                found = f"has {ours.size} bytes" if ours.size != theirs.size else "has another header"
                raise WorkerError(
                    f"{here}: {Path(ref.folder, file)} {found}, the driver saw {theirs.size} bytes with "
                    f"header {theirs.header_sha256[:12]}; copy the model anew, or start the search again"
                )
        # What an adapter does also depends on its config, and hashing it costs nothing.
        newer = [
            file for file in expected if seen[file].mtime_ns != expected[file].mtime_ns or checkpoint.kind == "adapter"
        ]
        if newer:
            with one_at_a_time(Path(ref.folder)):
                found = fingerprint(checkpoint).sha256
            if found != ref.sha256:
                changed = Path(ref.folder, newer[0] if len(newer) == 1 else "")
                raise WorkerError(
                    f"{here}: with {changed} its weights hash to {found[:12]}, the driver's to "
                    f"{ref.sha256[:12]}; copy the model anew, or start the search again"
                )
    except CheckpointError as error:
        raise WorkerError(f"{here}: {error}") from error
    return checkpoint


@contextmanager
def one_at_a_time(model: Path) -> Iterator[None]:
    """The workers of a node start together: the first hashes a model, the others find what it noted."""
    name = f"hash-{hashlib.sha256(str(model).encode()).hexdigest()[:32]}"
    with (node_folder() / name).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def node_folder() -> Path:
    """A folder for what the processes of one user share on one node.

    Raises:
        WorkerError: it cannot be made, or somebody else owns it.
    """
    folder = Path(tempfile.gettempdir(), f"meiosis-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        why = "there is a file of that name" if folder.exists() else f"it cannot be made ({error.strerror})"
        raise WorkerError(
            f"node {socket.gethostname()}: {folder}: expected a folder that workers can share, but {why}; "
            "remove what is in the way, or set TMPDIR to a folder that can be written"
        ) from error
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise WorkerError(f"{folder}: belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


def warm(files: Iterable[Path], report: Callable[[str], None] | None = None, folder: Path | None = None) -> int:
    """Read files into the page cache, once per node however many workers ask at the same time.

    The first caller reads; the others wait for it. More than the node's free memory is not read
    ahead: the end would push out the beginning.

    Args:
        report: called with a line now and then, if there is enough to read that it takes a while.
        folder: where the processes of this node meet, by default `node_folder()`.

    Returns:
        Bytes that this call read, 0 if others had done it.

    Raises:
        WorkerError: a file cannot be read.
    """
    paths = sorted({Path(file).resolve() for file in files})
    try:
        total = sum(path.stat().st_size for path in paths)
        if not total or total > _available_bytes():
            return 0
        with warm_stamp(paths, folder or node_folder()).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            status = os.fstat(lock.fileno())
            if status.st_size and time.time() - status.st_mtime < FRESH_SECONDS:
                return 0
            progress = ByteProgress("reading the models into memory", total, report)
            for path in paths:
                for step in _populate(path):
                    progress.advance(step)
            lock.write(f"process {os.getpid()} read {total} bytes\n".encode())
            return total
    except OSError as error:
        file = error.filename or "a model file"
        raise WorkerError(
            f"node {socket.gethostname()}: {file}: cannot be read ({error.strerror}); "
            "keep the model files in place while a search runs"
        ) from error


def warm_stamp(files: Iterable[Path], folder: Path) -> Path:
    """The file that tells when these files were read: locked meanwhile, one line for every time.

    Raises:
        OSError: a file is gone.
    """
    identity = [[str(path), *_identity(path)] for path in sorted({Path(file).resolve() for file in files})]
    return folder / f"warm-{hashlib.sha256(json.dumps([_boot_id(), identity]).encode()).hexdigest()[:32]}"


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _populate(path: Path) -> Iterable[int]:
    """Bring a file into the page cache and yield the bytes of every step."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            for start in range(0, size, STEP_BYTES):
                length = min(STEP_BYTES, size - start)
                try:
                    mapping.madvise(MADV_POPULATE_READ, start, length)
                except OSError:  # an older kernel, or a file system that cannot
                    mapping.madvise(mmap.MADV_WILLNEED, start, length)
                    for offset in range(start, start + length, 1 << 20):
                        os.pread(file.fileno(), min(1 << 20, start + length - offset), offset)
                yield length


def _available_bytes() -> int:
    """Memory that can be had without swapping; no limit where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def _boot_id() -> str:
    """Changes with every start of the machine, which begins with an empty page cache."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

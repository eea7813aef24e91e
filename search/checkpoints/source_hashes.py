"""The sources of a merge looked through by threads while the merge reads the same pages: finite, and which.

So a model that does not fit into memory is read from its disk once. What the cache of fingerprints knows
is not read at all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from search.checkpoints.byte_progress import Stopped, StopSwitch
from search.checkpoints.fingerprint import (
    Fingerprint,
    TensorDigest,
    adapted_fingerprint,
    cache_entry,
    digest_tensor,
    digests_from_cache,
    file_identity,
    fingerprint_of,
    refuse_non_finite,
)
from search.checkpoints.fingerprint_cache import read_cache, write_cache
from search.checkpoints.header import TensorInfo, damage, read_header
from search.checkpoints.reading import Checkpoint

AHEAD_TENSORS = 8
"""Tensors of the output that the threads may be ahead of the one that the merge gives out next: more could leave the
memory again before they are merged, fewer could make one of the two wait."""


class _File(NamedTuple):
    identity: list[int]
    tensors: list[TensorInfo]


class SourceHashes:
    """Fingerprints of several checkpoints in the making. A context manager: leaving it ends the threads.

    Args:
        checkpoints: model name -> its checkpoint.
        order: tensors of the output, in the order in which they are merged.
        hashed: models whose fingerprint is wanted; of the others only NaN and infinity are looked for, which
            takes a fraction of the time. What the cache knows, it tells of all.
        threads: how many tensors are hashed at a time.

    Raises:
        CheckpointError: a file cannot be read, or changed since its checkpoint was opened.
    """

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], order: Iterable[str], hashed: Iterable[str], threads: int
    ) -> None:
        self._checkpoints = dict(checkpoints)
        self._hashed = {path for name in hashed for path in _files_behind(self._checkpoints[name])}
        self._position = {name: position for position, name in enumerate(order)}
        self._digests: dict[Path, dict[str, TensorDigest]] = {}
        self._files: dict[Path, _File] = {}
        self._changed = threading.Condition()
        self._switch = StopSwitch()
        self._merged = 0
        self._failed: BaseException | None = None
        self._look_up()
        tasks = [tensor for file in self._files.values() for tensor in file.tensors]
        tasks.sort(key=lambda tensor: (self._place(tensor), str(tensor.file), tensor.start))
        self._tasks = iter(tasks)
        self._non_finite = any(d.nans or d.infinities for found in self._digests.values() for d in found.values())
        self._threads = [
            threading.Thread(target=self._work, name=f"hash-source-{number}", daemon=True)
            for number in range(min(threads, len(tasks)))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes that are hashed because the cache does not know them."""
        return sum(tensor.nbytes for file in self._files.values() for tensor in file.tensors)

    def merging(self, name: str) -> None:
        """Say that the merge came to this tensor of the output.

        Raises:
            CheckpointError: a source is damaged, or holds NaN or infinity (found so far).
        """
        with self._changed:
            self._merged = max(self._merged, self._position[name])
            self._changed.notify_all()
        self.check()

    def check(self) -> None:
        """Raise what is wrong with the sources as far as they were read."""
        if self._failed is not None:
            raise self._failed
        if self._non_finite:
            self.finish()  # the message counts them all

    def finish(self) -> dict[str, Fingerprint]:
        """Wait for the rest; model name -> fingerprint of those that were hashed or known, all finite.

        Raises:
            CheckpointError: a file changed meanwhile, or a model holds NaN or infinity.
        """
        with self._changed:
            self._merged = len(self._position)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._failed is not None:
            raise self._failed
        fresh: dict[str, Any] = {}
        for path, file in self._files.items():
            if file_identity(path) != file.identity:
                raise damage(path, "was changed while it was read", "wait until it is written")
            if path in self._hashed:
                fresh[str(path.resolve())] = cache_entry(file.identity, self._digests[path])
        if fresh:
            write_cache(fresh)
        unhashed = self._files.keys() - self._hashed
        found = {name: self._fingerprint(name) for name in self._checkpoints}  # refuses what is not finite
        return {name: one for name, one in found.items() if not unhashed & _files_behind(self._checkpoints[name])}

    def known(self) -> dict[str, Fingerprint]:
        """The fingerprints that the cache had, at once.

        Raises:
            CheckpointError: one of them is of a model that holds NaN or infinity.
        """
        known = (name for name, one in self._checkpoints.items() if not self._files.keys() & _files_behind(one))
        return {name: self._fingerprint(name) for name in known}

    def __enter__(self) -> SourceHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._switch.stop()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _fingerprint(self, name: str) -> Fingerprint:
        checkpoint = self._checkpoints[name]
        found = self._own_fingerprint(checkpoint)
        refuse_non_finite(name, found)
        base = checkpoint.base
        return found if base is None else adapted_fingerprint(found, self._own_fingerprint(base))

    def _own_fingerprint(self, checkpoint: Checkpoint) -> Fingerprint:
        digests = {tensor: self._digests[info.file][tensor] for tensor, info in checkpoint.tensors.items()}
        return fingerprint_of(checkpoint, digests)

    def _look_up(self) -> None:
        """Sort the files into those whose digests the cache has, and those to read."""
        known = read_cache()
        for checkpoint in self._checkpoints.values():
            for path in checkpoint.files:
                tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.file == path]
                identity = file_identity(path)
                if read_header(path) != {tensor.name: tensor for tensor in tensors}:
                    raise damage(path, "was changed since it was opened", "start again")
                found = digests_from_cache(known.get(str(path.resolve())), identity, tensors)
                self._digests[path] = found or {}
                if found is None:
                    self._files[path] = _File(identity, tensors)

    def _place(self, tensor: TensorInfo) -> int:
        return self._position.get(tensor.name, 0)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    tensor = next(self._tasks, None)
                    if tensor is None:
                        return
                    place = self._place(tensor)
                    while place > self._merged + AHEAD_TENSORS and not self._switch.stopped:
                        self._changed.wait()
                digest = digest_tensor(tensor, self._switch, hashed=tensor.file in self._hashed)
                self._digests[tensor.file][tensor.name] = digest
                if digest.nans or digest.infinities:
                    self._non_finite = True
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised by `check` in the thread that merges
            self._failed = self._failed or error
            self._switch.stop()


def _files_behind(checkpoint: Checkpoint) -> set[Path]:
    """The files that the fingerprint of a checkpoint depends on; of an adapter, also those of its base."""
    return {*checkpoint.files, *(checkpoint.base.files if checkpoint.base is not None else ())}

"""Tensors on their way to a file: written and hashed in two threads while the next one is merged."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

from search.checkpoints.byte_progress import Meter, NoMeter
from search.checkpoints.fingerprint import CHUNK_BYTES, count_non_finite
from search.checkpoints.header import quoted
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.errors import UserError

WRITE_BYTES = 1 << 26
"""Written at once; then the disk is asked to begin with them, so that the wait at the end is short."""


class WrittenTensor(NamedTuple):
    """One tensor of a written checkpoint; `sha256` is that of its bytes, 64 hex digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


class WritePipeline:
    """Takes tensors in any order and puts each at its place in its file. A context manager.

    Args:
        limit_bytes: tensors under way together take no more memory than this, unless one alone does.
        finite: whether NaN and infinity are refused.
        meter: told of every tensor that is written.
    """

    def __init__(self, limit_bytes: int, *, finite: bool = False, meter: Meter | None = None) -> None:
        self._limit, self._finite, self._meter = limit_bytes, finite, meter or NoMeter()
        self._hashers = ThreadPoolExecutor(1, "hash-output")
        self._writers = ThreadPoolExecutor(1, "write-output")
        self._free = threading.Condition()
        self._under_way = 0
        self._failed: BaseException | None = None
        self._hashes: list[tuple[str, str, tuple[int, ...], Future[str]]] = []
        self._writes: list[Future[None]] = []

    def put(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview, descriptor: int, place: int) -> None:
        """Take a tensor; returns when there is room for the next one.

        Args:
            dtype: as in safetensors.
            data: its bytes, which must not change afterwards.
            descriptor, place: the open file, and where in it the tensor begins.

        Raises: what went wrong with an earlier one.
        """
        nbytes = len(data)
        with self._free:
            self._free.wait_for(lambda: not self._under_way or self._under_way + nbytes <= self._limit or self._failed)
            self._check()
            self._under_way += nbytes
        parts = [2]  # hash and write; the later of them makes room

        def done(_: object) -> None:
            with self._free:
                parts[0] -= 1
                if not parts[0]:
                    self._under_way -= nbytes
                self._free.notify_all()

        hashed = self._submit(self._hashers, self._hash, name, dtype, data)
        written = self._submit(self._writers, self._write, data, descriptor, place)
        hashed.add_done_callback(done)
        written.add_done_callback(done)
        self._hashes.append((name, dtype, shape, hashed))
        self._writes = [*(one for one in self._writes if not one.done()), written]

    def close_file(self, descriptor: int) -> None:
        """Bring a file to the disk and close it, after all that was put before."""

        def close() -> None:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        self._writes.append(self._submit(self._writers, close))

    def finish(self) -> list[WrittenTensor]:
        """Wait for everything; what was written, in the order of `put`.

        Raises:
            OSError: the disk.
            UserError: a tensor with NaN or infinity, where they are refused.
        """
        for write in self._writes:
            write.result()
        written = [WrittenTensor(name, dtype, shape, hash_.result()) for name, dtype, shape, hash_ in self._hashes]
        self._check()
        return written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            with self._free:
                self._failed = self._failed or error
        for threads in (self._hashers, self._writers):
            threads.shutdown(wait=True, cancel_futures=False)  # files are closed by the last task

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _submit(self, threads: ThreadPoolExecutor, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        def run() -> Any:
            try:
                return work(*arguments)
            except BaseException as error:
                with self._free:
                    self._failed = self._failed or error
                    self._free.notify_all()
                raise

        return threads.submit(run)

    def _hash(self, name: str, dtype: str, data: memoryview) -> str:
        hashed, bad = hashlib.sha256(), 0
        for start in range(0, len(data), CHUNK_BYTES):
            if self._failed is not None:
                break
            chunk = data[start : start + CHUNK_BYTES]
            hashed.update(chunk)
            bad += sum(count_non_finite(chunk, dtype)) if self._finite else 0
        if bad:
            raise UserError(
                f"tensor {quoted(name)}: {bad} merged values are NaN or infinite in {TORCH_NAMES[dtype]}, though the "
                "sources are finite; write in a wider dtype (bfloat16 or float32), or change its parameters"
            )
        return hashed.hexdigest()

    def _write(self, data: memoryview, descriptor: int, place: int) -> None:
        done = begun = 0
        while done < len(data) and self._failed is None:
            done += os.pwrite(descriptor, data[done : done + WRITE_BYTES], place + done)
            if done - begun >= WRITE_BYTES or done == len(data):
                # Starts the writing of what is dirty, and drops nothing of it from memory.
                os.posix_fadvise(descriptor, place + begun, done - begun, os.POSIX_FADV_DONTNEED)
                begun = done
        self._meter.wrote(len(data))

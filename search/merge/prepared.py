"""What operators prepare, computed once per node and shared by its workers through files.

One file holds what `Operator.prepare` returned for every tensor of one set of models. Its name is a
hash of all that the content depends on (operator, version, bytes of the models), so a file is never
stale, and runs share them. The first worker computes under a lock while the others wait; then all map
the same pages. Files that nobody asked for in a week are removed when another is written.

A folder that cannot be used (full, read-only) costs time and memory, never a candidate: what was
computed is then used by its process alone, which says so once with a `RuntimeWarning`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

Tensors = dict[str, Tensor]

Prepared = dict[str, Tensors]
"""Tensor name -> what `prepare` returned for it; tensors with nothing prepared are left out."""

KEEP_SECONDS = 7 * 24 * 3600.0

PART_BYTES = 1 << 29
"""What some operators prepare is as large as the models; so much of it is in memory before it is written."""

_FORMAT = 1
_OURS = re.compile(r"[0-9a-f]{32}\w*\.(safetensors|lock|part)")


class PreparedFolder:
    """A node-local folder of prepared files. Any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(error)

    def load(self, facts: Mapping[str, object], compute: Callable[[], Iterable[tuple[str, Tensors]]]) -> Prepared:
        """What was prepared for `facts`, by whoever came first.

        Args:
            facts: JSON data that determines the result of `compute`.
            compute: called only if no usable file is there, and where the folder can be used in one process
                of the node at a time; gives tensor after tensor, of which a part is in memory at a time. What it
                raises passes through.
        """
        text = json.dumps({**facts, "format": _FORMAT}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        found = _read(path)
        if found is not None:
            return found
        with self._locked(path.with_suffix(".lock")):
            found = _read(path)
            if found is not None:
                return found
            return self._store(path, text, compute())

    def _store(self, path: Path, text: str, computed: Iterable[tuple[str, Tensors]]) -> Prepared:
        """Write what comes in parts, the file that tells their number last; mapped pages are shared, others not."""
        stored: Prepared = {}
        held: Prepared = {}
        size = parts = 0
        usable = True
        for name, items in computed:
            held[name] = items
            size += sum(tensor.nbytes for tensor in items.values())
            if size < PART_BYTES or not usable:
                continue
            part = _part(path, parts)
            usable = self._try_write(part, held, text)
            if usable:
                stored.update(_read_one(part)[0])
                held, size, parts = {}, 0, parts + 1
        if usable and self._try_write(path, held, text, parts):
            with suppress(OSError):
                _sweep(self._folder)
            return _read(path) or {**stored, **held}
        return {**stored, **held}

    def _try_write(self, path: Path, prepared: Prepared, text: str, parts: int = 0) -> bool:
        try:
            _write(path, prepared, text, parts)
        except (OSError, safetensors.SafetensorError) as error:
            self._warn(error)
            return False
        return True

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Alone with this lock, as far as the folder lets us have one."""
        try:
            file = path.open("w")
        except OSError as error:
            self._warn(error)
            yield
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel, also when the process is killed
            except OSError as error:  # a file system without locks
                self._warn(error)
            yield

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._folder}: cannot be used ({error}); every worker prepares the models for itself, in memory",
                RuntimeWarning,
                stacklevel=3,
            )


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}p{number}.safetensors")


def _read(path: Path) -> Prepared | None:
    """The content of a file and its parts, mapped, not read; None if one is not there, cut short or not readable."""
    try:
        prepared, parts = _read_one(path)
        for number in range(parts):
            prepared.update(_read_one(_part(path, number))[0])
    except (OSError, safetensors.SafetensorError):
        return None
    return prepared


def _read_one(path: Path) -> tuple[Prepared, int]:
    """What one file holds, and how many parts belong to it."""
    prepared: Prepared = {}
    with safetensors.safe_open(path, framework="pt") as file:
        parts = int(json.loads((file.metadata() or {}).get("content", "{}")).get("parts", 0))
        for key in file.keys():  # noqa: SIM118 - a safe_open is no mapping
            tensor, _, item = key.rpartition("/")
            prepared.setdefault(tensor, {})[item] = file.get_tensor(key)
    with suppress(OSError):  # another user's file
        os.utime(path)
    return prepared, parts


def _write(path: Path, prepared: Prepared, facts: str, parts: int) -> None:
    flat = {f"{name}/{item}": tensor for name, items in prepared.items() for item, tensor in items.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        safetensors.torch.save_file(flat, temporary, metadata={"content": json.dumps({"facts": facts, "parts": parts})})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sweep(folder: Path) -> None:
    """Remove files of ours that were not used for long; processes that have them mapped keep the pages."""
    limit = time.time() - KEEP_SECONDS
    for path in folder.iterdir():
        with suppress(OSError):
            if _OURS.fullmatch(path.name) and path.stat().st_mtime < limit:
                path.unlink()

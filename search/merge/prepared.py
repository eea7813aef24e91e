"""What operators prepare, computed once per node and shared by its workers through files.

One file holds what `Operator.prepare` returned for every tensor of one set of models. Its name is a
hash of all that the content depends on (operator, version, bytes of the models), so a file is never
stale. The first worker computes under a lock while the others wait; then all map the same pages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

Prepared = dict[str, dict[str, Tensor]]
"""Tensor name -> what `prepare` returned for it; tensors with nothing prepared are left out."""

_FORMAT = 1


class PreparedFolder:
    """A node-local folder of prepared files. Any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, facts: Mapping[str, object], compute: Callable[[], Prepared]) -> Prepared:
        """What was prepared for `facts`, by whoever came first.

        Args:
            facts: JSON data that determines the result of `compute`.
            compute: called in at most one process of the node at a time, and only if no file is there.
        """
        text = json.dumps({**facts, "format": _FORMAT}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        found = _read(path)
        if found is None:
            with _locked(path.with_suffix(".lock")):
                found = _read(path)
                if found is None:
                    _write(path, compute(), text)
                    found = _read(path)
        if found is None:
            raise OSError(f"{path}: cannot be read back right after it was written")
        return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel, also when the process is killed
        yield


def _read(path: Path) -> Prepared | None:
    """The content of a file, mapped, not read; None if it is not there or was cut short."""
    prepared: Prepared = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                tensor, _, item = key.rpartition("/")
                prepared.setdefault(tensor, {})[item] = file.get_tensor(key)
    except FileNotFoundError:
        return None
    except safetensors.SafetensorError:
        return None
    return prepared


def _write(path: Path, prepared: Prepared, facts: str) -> None:
    flat = {f"{name}/{item}": tensor for name, items in prepared.items() for item, tensor in items.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        safetensors.torch.save_file(flat, temporary, metadata={"facts": facts})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise

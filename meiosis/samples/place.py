"""The folder of a family of sample models: built beside its place in a process of its own, complete or not there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluators.errors import MeiosisError, UserError


def refuse_foreign(folder: Path, card: str, kind: str) -> None:
    """Raise `UserError` unless the folder is new, empty, or a family of this kind, which may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; the sample models need a new or empty folder")
    if not any(folder.iterdir()):
        return
    try:
        there = json.loads((folder / card).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there != kind:
        found = min(entry.name for entry in folder.iterdir())
        raise UserError(
            f"{folder} is not empty and holds no sample models ('{found}' is there, no readable {card}); "
            "name a new folder, or empty this one"
        )


@contextlib.contextmanager
def workshop_beside(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """A hidden folder beside `folder`, held by one process at a time and emptied before use.

    What a killed build has left there is removed by the next one. The lock is on the folder itself, and
    the training process inherits it, so a new build cannot meet an orphan of the old one.
    """
    workshop = folder.parent / f".{folder.name}.building"
    while True:
        workshop.mkdir(exist_ok=True)
        handle = os.open(workshop, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{folder}: another process is building it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if workshop.exists() and os.path.samestat(os.fstat(handle), workshop.stat()):
            break
        os.close(handle)  # the one we waited for has removed it
    os.set_inheritable(handle, True)
    try:
        for entry in workshop.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield workshop
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        os.close(handle)


def order(workshop: Path, module: str, given: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Run `main` of a module in a fresh interpreter that imports the same packages as this one.

    Args:
        given: what it reads, a JSON object, beside `folder`, the empty folder `family` of the workshop.
    """
    target = workshop / "family"
    target.mkdir()
    order = {"folder": str(target), **given}
    here = str(Path(__file__).parents[2])
    command = f"import sys; sys.path.insert(0, {here!r}); from {module} import main; main()"
    environment = {
        **os.environ,
        # One thread per kernel: see `training`. AVX2 kernels everywhere, so that machines with AVX-512
        # give the same bits as machines without.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            close_fds=False,  # it inherits the lock on the workshop
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.close()
            for line in process.stdout:
                report(line.rstrip("\n"))
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise MeiosisError(f"training the sample models failed (exit status {status}): {said[-1]}")


def replace(folder: Path, finished: Path, aside: Path) -> None:
    """Put the finished folder in place of whatever family is there."""
    if folder.exists():
        folder.rename(aside)
    finished.rename(folder)

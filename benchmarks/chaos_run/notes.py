"""What workers noted, see `chaos_run.slow_score`, and the processes of a chaos run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "CHAOS_RUN"
"""Environment variable that all processes of a chaos run share: the folder of the run."""


class Notes:
    """Trials that begin and end in other processes, read as they are noted.

    Attributes:
        inside: process -> the trial that began there and did not end yet. Of processes that are alive.
        begun: how many trials were begun, those that were begun again included.
        ended: different trials that were carried to their end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}
        self._open: dict[str, str] = {}
        self.begun = 0
        self.ended: set[str] = set()

    def look(self) -> None:
        """Read what was noted since the last look."""
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                file.seek(self._read.get(path.name, 0))
                whole = file.read().rpartition(b"\n")[0]
            if not whole:
                continue
            self._read[path.name] = self._read.get(path.name, 0) + len(whole) + 1
            for line in whole.decode().splitlines():
                what, _, trial = line.partition(" ")
                if what == "begin":
                    self.begun += 1
                    self._open[path.name] = trial
                else:
                    self._open.pop(path.name, None)
                    self.ended.add(trial)

    @property
    def inside(self) -> dict[int, str]:
        found = {}
        for name, trial in self._open.items():
            pid, _, started = name.partition(".")
            if started_at(int(pid)) == started:
                found[int(pid)] = trial
        return found


def marked(folder: Path) -> list[int]:
    """Processes of the chaos run in `folder` that are alive."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if is_marked(pid, folder)]


def is_marked(pid: int, folder: Path) -> bool:
    """Whether a process is alive and belongs to the chaos run in `folder`."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{MARK}={folder}".encode() in variables and state(pid) not in "ZX"


def workers(folder: Path) -> list[int]:
    """Those of `marked` that are workers of a search."""
    found = []
    for pid in marked(folder):
        try:
            if b"MeiosisWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def state(pid: int) -> str:
    """The letter for the state of a process; X when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def started_at(pid: int) -> str:
    """When a process started, in ticks of the machine: numbers of processes are used again. Empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Processes that were started by this one, or by such a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(entry.parent.name))
    found, rest = [], [pid]
    while rest:
        children = parents.get(rest.pop(), [])
        found += children
        rest += children
    return found


def send(pids: Sequence[int], what: signal.Signals) -> int:
    """Send a signal; returns how many processes were there to get it."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, what)
            reached += 1
        except ProcessLookupError:
            continue
    return reached


def freeze(pid: int, seconds: float = 5.0) -> bool:
    """Stop a process where it is; returns whether it stands still."""
    send([pid], signal.SIGSTOP)
    end = time.monotonic() + seconds
    while state(pid) not in "TtZX" and time.monotonic() < end:
        time.sleep(0.001)
    return state(pid) in "Tt"

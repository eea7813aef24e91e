"""Trackers for the tests: one that keeps notes, and some that misbehave."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from search.tracker import TrackedRun, TrackedTrial, Tracker, TrackerOptions


class Options(TrackerOptions):
    every: int = 1


class Notes(Tracker):
    """Writes all that it is told into its folder of the run."""

    Options = Options
    _file: Path

    def begin(self, run: TrackedRun) -> None:
        self._file = run.folder / "notes.jsonl"
        self._note("begin", {"id": run.remembered(time.monotonic_ns), "seed": run.config["seed"]})

    def trial(self, trial: TrackedTrial) -> None:
        if trial.candidate % self.options.every == 0:
            self._note("trial", asdict(trial))

    def close(self, how: str) -> None:
        self._note("close", {"how": how, "thread": threading.current_thread().name})

    def _note(self, what: str, content: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"what": what, **content}) + "\n")


class Absent(Notes):
    needs = "a_library_that_nobody_has"
    install = "pip install a-library-that-nobody-has"


class Down(Notes):
    """A server that goes away."""

    def trial(self, trial: TrackedTrial) -> None:
        if trial.candidate == 3:
            raise ConnectionError("the server is down\nand more")
        super().trial(trial)


class Leaves(Notes):
    """Calls `sys.exit`, as some libraries do."""

    def begin(self, run: TrackedRun) -> None:
        raise SystemExit(3)


class Hangs(Notes):
    def begin(self, run: TrackedRun) -> None:
        time.sleep(3600)


class NoTracker:
    pass

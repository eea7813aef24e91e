"""What tests of searches that score only some of the items share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from driving import content

from search.config import load_config
from search.errors import InterruptedRun
from search.local_pool import LocalPool
from search.pool import Pool, WorkerPlan
from search.progress import Progress
from search.run import Finished, resume, start
from search.setup import Setup, check
from search.store.run_folder import RunFolder

DOMAINS = ("python", "english", "cpp")


class Quiet:
    """A watcher that interrupts the run after so many candidates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop_after = stop_after

    def line(self, text: str) -> None: ...

    def progress(self, state: Progress) -> None:
        if self._stop_after is not None and state.phase == "search" and state.done >= self._stop_after:
            raise KeyboardInterrupt


def checked(config: dict[str, Any], folder: Path) -> Setup:
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(config))
    return check(load_config(file))


def pool_of(workers: int) -> Callable[[Setup, WorkerPlan, Path], Pool]:
    return lambda setup, plan, folder: LocalPool(plan, workers=workers)


def stopped(setup: Setup, workers: int, stop_after: int) -> RunFolder:
    """A run that was interrupted after so many candidates."""
    with pytest.raises(InterruptedRun):
        start(setup, pool_of(workers), Quiet(stop_after), "stopped")
    return RunFolder(Path(setup.config.results) / "stopped")


def contents(folder: RunFolder) -> list[object]:
    return content(folder.events())


def whole_and_resumed(setup: Setup, stop_after: int) -> tuple[Finished, RunFolder]:
    """A run on one worker, and one that was stopped and went on, on two."""
    whole = start(setup, pool_of(1), Quiet(), "whole")
    folder = stopped(setup, 2, stop_after)
    resume(folder, pool_of(2), Quiet())
    return whole, folder

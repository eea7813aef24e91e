"""A run keeps its workers no longer than it has work for them."""

from __future__ import annotations

from pathlib import Path

from command_line import short, write_config
from family import config_of

from search.config import load_config
from search.local_pool import LocalPool
from search.pool import Pool, WorkerPlan
from search.run import Watcher, start
from search.setup import Setup, check


def test_the_workers_are_released_before_the_model_is_exported(family: Path, tmp_path: Path) -> None:
    """On a cluster other runs can have them meanwhile."""
    exported: list[bool] = []

    class Noting(LocalPool):
        def close(self) -> None:
            exported.append((tmp_path / "runs" / "run" / "best").exists())
            super().close()

    def make(setup: Setup, plan: WorkerPlan, folder: Path) -> Pool:
        return Noting(plan, 1)

    config = write_config(short(config_of(family, tmp_path / "runs"), budget=6), tmp_path)
    finished = start(check(load_config(config)), make, Watcher(), "run")
    assert exported[0] is False
    assert finished.model.exists()

"""The workers that a config asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from meiosis.cli.common import say
from meiosis.cli.memory import planned

if TYPE_CHECKING:
    from search.config import Config
    from search.pool import Pool, WorkerPlan
    from search.setup import Setup


def make_pool(setup: Setup, plan: WorkerPlan, folder: Path) -> Pool:
    """The workers that a config asks for."""
    from search.worker_plan import with_room

    cluster = setup.config.cluster
    if cluster.pool == "local":
        from search.local_pool import LocalPool

        with planned(setup) as memory:
            return LocalPool(with_room(plan, setup, memory), cluster.workers)
    from cluster.pool import RayPool

    with planned(setup, folder / "ray.log") as memory:
        return RayPool(
            with_room(plan, setup, memory),
            workers=cluster.workers,
            address=cluster.address,
            trial_seconds=cluster.trial_seconds,
            gpus_per_worker=cluster.gpus_per_worker,
            shards=cluster.shards,
            working_folder=folder,
            report=say,
        )


def early_ray(config: Config) -> AbstractContextManager[Callable[[], None]]:
    """Gives a function that begins to start the Ray that a config needs, if it is one of our own, beside other work."""
    cluster = config.cluster
    if cluster.pool != "ray" or cluster.address is not None:
        return nullcontext(lambda: None)
    from cluster.early_ray import early_ray

    return early_ray(min(cluster.workers, os.cpu_count() or 1), cluster.gpus_per_worker > 0)

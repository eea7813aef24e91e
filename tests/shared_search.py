"""A search on a cluster that others use as well, as a program, and the body of its workers.

    python shared_search.py ADDRESS FOLDER WORKERS GPUS_PER_WORKER BUDGET

Trials take `SECONDS` each, none once the file `hurry` is in the folder. What the pool says goes to `said`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from scheduling.problem import make_population, score

from search.driver import Driver, Limits
from search.pool import Job, Outcome, Pool, WorkerPlan
from search.store.history import History
from search.store.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 1.0
WINDOW = 12


class Bowl:
    """Notes the candidate, waits, and scores it."""

    def __init__(self, plan: WorkerPlan) -> None:
        assert plan.prepared_folder is not None
        self.folder = Path(plan.prepared_folder)

    def run(self, job: Job) -> Outcome:
        with (self.folder / "starts").open("a") as starts:
            starts.write(f"{job.candidate}\n")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not (self.folder / "hurry").exists():
            time.sleep(0.05)
        return score(job)


def search(folder: Path, budget: int, make_pool: Callable[[], Pool]) -> str:
    """Search to the end; the digest of the history."""
    population = make_population(budget=budget, window=WINDOW, layers=1, optimizer="random_search")
    with History.open(folder / "history") as history:
        driver = Driver(population, history, Spool(folder / "spool"), make_pool, Limits(budget, WINDOW))
        try:
            driver.search()
        finally:
            driver.close()
        return history.digest()


def main(address: str, folder: Path, workers: int, gpus: float, budget: int) -> None:
    from worker_bodies import plan

    from cluster.pool import RayPool

    working = folder / "workers"
    working.mkdir(exist_ok=True)

    def say(line: str) -> None:
        with (folder / "said").open("a") as said:
            said.write(f"{line}\n")

    def make_pool() -> Pool:
        options = {"address": address, "workers": workers, "gpus_per_worker": gpus, "report": say}
        return RayPool(plan(folder), working_folder=working, body="shared_search:Bowl", **options)  # type: ignore[arg-type]

    (folder / "pid").write_text(str(os.getpid()))
    digest = search(folder, budget, make_pool)
    (folder / "digest").write_text(digest)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))

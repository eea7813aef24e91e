"""How busy workers are, in arrival order, in ordered commit and with a barrier between generations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scheduling.problem import DURATIONS, Generations, make_population, score
from scheduling.simulated_pool import Fates, SimulatedPool, Stint

from search.driver import Driver, Limits
from search.pool import Pool, WorkerPlan
from search.population import Population
from search.store.events import Trial
from search.store.history import History
from search.store.spool import Spool

if TYPE_CHECKING:
    from cluster.pool import RayPool

GENERATION_0 = 4
"""Candidates of `make_population` before the search: three parents and the base."""


@dataclass(frozen=True)
class Discipline:
    """A way to hand out candidates: `window` is that many times the workers."""

    name: str
    window: int
    ordered: bool
    population: type[Population] = Population


ARRIVAL = Discipline("arrival order, window twice the workers", 2, ordered=False)
ORDERED = Discipline("ordered commit, window twice the workers", 2, ordered=True)
BARRIER = Discipline("barrier: generations as large as the pool", 1, False, Generations)


def utilisation(stints: Sequence[Stint], workers: int) -> float:
    """The share of their time that workers are busy in the steady state.

    That is from the start of the first candidate of the search, after generation 0, which waits for the parents,
    to the start of the last one, after which there is nothing to do for workers that become free.
    """
    begin, end = steady_state(stints)
    busy = sum(max(0.0, min(stint.end, end) - max(stint.start, begin)) for stint in stints)
    return busy / (workers * (end - begin))


def steady_state(stints: Sequence[Stint]) -> tuple[float, float]:
    """When the first and the last candidate of the search were started."""
    searched = [stint.start for stint in stints if stint.key[0] >= GENERATION_0]
    return min(searched), max(searched)


def starved(pool: SimulatedPool) -> float:
    """The share of evaluations in the steady state after which no job was queued for the worker."""
    begin, end = steady_state(pool.stints)
    ended = sum(begin <= stint.end < end for stint in pool.stints)
    return sum(begin <= time < end for time in pool.starved_at) / max(ended, 1)


def search(folder: Path, pool: Pool, discipline: Discipline, *, budget: int, layers: int = 1) -> list[Trial]:
    """Search with random points on a pool; the trials in the order in which they were recorded."""
    window = discipline.window * pool.size
    kind: type[Population] = type("_Sized", (discipline.population,), {"size": pool.size})
    population = make_population(kind, budget=budget, window=window, layers=layers, optimizer="random_search")
    with History.open(folder / "history") as history:
        limits = Limits(budget, window, discipline.ordered)
        Driver(population, history, Spool(folder / "spool"), lambda: pool, limits).search()
        return [event for event in history.events() if isinstance(event, Trial)]


def simulated(
    folder: Path, fates: Fates, discipline: Discipline, *, workers: int, budget: int, submit_seconds: float = 0.0
) -> tuple[float, SimulatedPool]:
    """Utilisation of simulated workers, and their pool."""
    pool = SimulatedPool(workers, fates, score, replace_seconds=2.0, submit_seconds=submit_seconds)
    search(folder, pool, discipline, budget=budget)
    return utilisation(pool.stints, workers), pool


def real(
    folder: Path, discipline: Discipline, *, workers: int, budget: int, mean: float, variation: float, seed: int = 0
) -> float:
    """Utilisation of workers on Ray that sleep as long as simulated ones with the same seed."""
    folder.mkdir(parents=True)
    with sleeping_pool(folder, workers, mean, variation, seed) as pool:
        pool.ready()
        trials = search(folder, pool, discipline, budget=budget)
    names = {name: number for number, name in enumerate(sorted({trial.worker for trial in trials}))}
    stints = [
        Stint(names[t.worker], (t.candidate, t.items), t.metrics["sleep.began"], t.metrics["sleep.ended"])
        for t in trials
        if t.failure_kind is None
    ]
    return utilisation(stints, workers)


def sleeping_pool(folder: Path, workers: int, mean: float, variation: float, seed: int = 0) -> RayPool:
    """A pool on Ray whose workers sleep; it takes their durations from `folder`."""
    from cluster.pool import RayPool

    (folder / DURATIONS).write_text(json.dumps({"mean": mean, "variation": variation}))
    plan = WorkerPlan({}, base="base", evaluators=(), seed=seed, prepared_folder=str(folder))
    return RayPool(plan, workers=workers, working_folder=folder, body="scheduling.problem:Sleeper")

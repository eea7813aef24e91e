"""A cheap deterministic landscape on recipes, for tests of the driver that need thousands of trials."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from evaluators.base import ItemPool, Metric, Scores
from search.config import Constraint, ObjectivesConfig, SpaceConfig
from search.objective import make_objective
from search.optimizers import optimizer_named
from search.pool import Failure, Job, Outcome, WorkerPlan
from search.population import Population
from search.racing.fitness import Fitness
from search.recipe import ModelRef, Recipe
from search.space import make_space

GOAL = {"a": 0.5, "b": 0.3, "c": 0.1}
SOURCES = tuple(GOAL)
TENSORS = ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight"]
BASELINES = ("uniform_soup", "greedy_soup", "task_arithmetic", "slerp", "ties")


def loss_of(recipe: Recipe) -> float:
    """How far the weights of a recipe are from `GOAL`, summed over sources, mean over its rules."""
    total = 0.0
    for rule in recipe.rules:
        shares = {name: float(values.get("weight", 0.5)) for name, values in rule.sources.items()}
        if rule.operator == "linear":
            shares = {name: weight / sum(shares.values()) for name, weight in shares.items()}
        total += sum((shares.get(name, 0.0) - best) ** 2 for name, best in GOAL.items())
    return total / len(recipe.rules)


class Landscape:
    """Body of a worker that scores a recipe by `loss_of`, with noise by item; every eleventh fails."""

    def __init__(self, plan: WorkerPlan | None = None) -> None: ...

    def run(self, job: Job) -> Outcome:
        if job.candidate % 11 == 9:
            return Outcome(job.candidate, job.items, failure=Failure("error", "every eleventh fails"))
        noise = np.random.default_rng(job.candidate).normal(0, 0.01, 20)
        values = loss_of(job.recipe) + noise
        scores = Scores(tuple(f"{job.items}{i}" for i in range(20)), {"loss": values}, np.ones(20))
        return Outcome(
            job.candidate,
            job.items,
            scores={"e": scores},
            metrics={"e.loss": float(values.mean())},
            weights_sha256=job.recipe.hash if job.hash_weights else None,
        )


DEADLY = (13, 15, 31)


class Deadly(Landscape):
    """Where `DEADLY` candidates end the process, whichever it is; every start is noted in `prepared_folder`."""

    def __init__(self, plan: WorkerPlan) -> None:
        assert plan.prepared_folder is not None
        self._starts = Path(plan.prepared_folder, "starts")

    def run(self, job: Job) -> Outcome:
        with self._starts.open("a") as log:
            log.write(f"{job.candidate}\n")
        if job.candidate in DEADLY:
            os._exit(1)
        return super().run(job)


class Shuffled:
    """A pool of `workers` whose results come in an order that a seed decides, as on a real cluster.

    Attributes:
        ran: jobs in that order.
    """

    def __init__(self, workers: int, seed: int, body: Callable[[Job], Outcome] | None = None) -> None:
        """`body` makes the outcome of a job; None: that of a `Landscape`."""
        self._workers, self._random = workers, random.Random(seed)
        self._queue: deque[Job] = deque()
        self._body = body or Landscape().run
        self.ran: list[tuple[int, ItemPool]] = []

    @property
    def size(self) -> int:
        return self._workers

    @property
    def busy(self) -> int:
        return min(self._workers, len(self._queue))

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        if not self._queue:
            return ()
        index = self._random.randrange(self.busy)
        job = self._queue[index]
        del self._queue[index]
        self.ran.append(job.key)
        return (self._body(job),)

    def cancel(self, key: tuple[int, ItemPool]) -> None: ...

    def close(self) -> None: ...


def population(
    budget: int = 60,
    window: int = 4,
    normalize: str = "none",
    optimizer: str = "diagonal_cma",
    constraints: tuple[Constraint, ...] = (),
    fitness: Fitness | None = None,
) -> Population:
    """A population over three sources with the loss `e.loss`."""
    models = {name: ModelRef(path=name, sha256=name) for name in ("base", *SOURCES)}
    config = SpaceConfig.model_validate(
        {
            "operator": "task_arithmetic",
            "split": [],
            "parameters": {"weight": {"low": 0, "high": 1, "initial": 0.9}},
        }
    )
    objective = make_objective(
        ObjectivesConfig.model_validate({"terms": ["e.loss"], "normalize": normalize}),
        constraints,
        {"e.loss": Metric("minimize")},
    )
    return Population(
        make_space(config, tensors=TENSORS, models=models, sources=SOURCES),
        objective,
        BASELINES,
        optimizer_named(optimizer),
        budget=budget,
        window=window,
        seed=0,
        step=0.1,
        fitness=fitness,
    )

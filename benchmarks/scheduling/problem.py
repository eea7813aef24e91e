"""What is searched in the measurements of the driver: a bowl, over as many genes as a 7 B model has with layers."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from scheduling.simulated_pool import Fates, log_normal

from evaluators.base import Metric, Scores
from search.candidate import Candidate
from search.config import ObjectivesConfig, SpaceConfig
from search.objective import make_objective
from search.optimizers import optimizer_named
from search.pool import Job, Outcome, WorkerPlan
from search.population import Population
from search.recipe import ModelRef
from search.space import make_space

SOURCES = ("a", "b", "c")
GOAL = {"a": 0.5, "b": 0.3, "c": 0.1}
ITEMS = 200
"""Items that a candidate is scored on."""
DURATIONS = "durations.json"


def tensors(layers: int) -> list[str]:
    """Names of the tensors of a Llama model."""
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    inner = [f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


def make_population(
    kind: type[Population] = Population, *, budget: int, window: int, layers: int = 32, optimizer: str = "diagonal_cma"
) -> Population:
    """A population over three sources, with a weight per source and layer; generation 0 is the parents."""
    models = {name: ModelRef(path=name, sha256=name) for name in ("base", *SOURCES)}
    weight = {"low": 0, "high": 1, "initial": 0.9}
    config = {"operator": "task_arithmetic", "layers_per_group": 1, "split": [], "parameters": {"weight": weight}}
    objectives = ObjectivesConfig.model_validate({"terms": ["e.loss"], "normalize": "none"})
    return kind(
        make_space(SpaceConfig.model_validate(config), tensors=tensors(layers), models=models, sources=SOURCES),
        make_objective(objectives, (), {"e.loss": Metric("minimize")}),
        (),
        optimizer_named(optimizer),
        budget=budget,
        window=window,
        seed=0,
        step=0.1,
    )


class Generations(Population):
    """Asks as a search with generations does: the next `size` candidates when all of the last are told."""

    size = 8
    _searched = 0

    def ask(self) -> Candidate | None:
        if self._searched % self.size == 0 and len(self._metrics) < self.asked:
            return None
        candidate = super().ask()
        self._searched += candidate is not None and candidate.genome is not None
        return candidate


@cache
def _items(count: int) -> tuple[str, ...]:
    return tuple(f"document/{number}" for number in range(count))


def score(job: Job) -> Outcome:
    """How far the weights of the recipe are from `GOAL`, with noise by item."""
    rules = job.recipe.rules
    total = 0.0
    for rule in rules:
        for name, best in GOAL.items():
            total += (float(rule.sources.get(name, {}).get("weight", 0.0)) - best) ** 2
    values = total / len(rules) + np.random.default_rng(job.candidate).normal(0, 0.01, ITEMS)
    scores = Scores(_items(ITEMS), {"loss": values}, np.ones(ITEMS))
    return Outcome(job.candidate, job.items, scores={"e": scores}, metrics={"e.loss": float(values.mean())})


class Sleeper:
    """Body of a real worker that does nothing for as long as a simulated one would.

    Workers import it by its name, so the folder `benchmarks` must be on the path. When it began and ended is among
    the metrics, in seconds of the machine's monotonic clock.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        assert plan.prepared_folder is not None
        durations = json.loads(Path(plan.prepared_folder, DURATIONS).read_text())
        self._fates = Fates(log_normal(durations["mean"], durations["variation"]), plan.seed)

    def run(self, job: Job) -> Outcome:
        seconds, _, _ = self._fates.of(job, 1)
        began = time.monotonic()
        time.sleep(seconds)
        outcome = score(job)
        times = {"sleep.began": began, "sleep.ended": time.monotonic()}
        return replace(outcome, metrics={**outcome.metrics, **times})

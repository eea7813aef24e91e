"""Searches of a benchmark, each in a run folder, and what their histories say."""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from quality.curves import Incumbents, Step
from quality.landscapes import Landscape, load, quality
from quality.methods import Method, with_method
from quality.table_model import NAMES, patterns, point_of, write_models

from search.config import load_config
from search.errors import UserError
from search.evaluation import Evaluation
from search.local_pool import LocalPool
from search.manifest import read_manifest
from search.pool import Job
from search.progress import Watcher
from search.reopening import load_setup
from search.replay import replay_ordered
from search.run import make_population, start
from search.setup import Setup, check
from search.store.run_folder import RunFolder
from search.store.sessions import Sessions
from search.worker_plan import worker_plan


@dataclass(frozen=True)
class Curve:
    """One search.

    Attributes:
        steps: when the best known candidate changed.
        quality: candidate -> what it is worth on items that no search saw; smaller is better.
        items: item-evaluations in all.
        candidates: how many were asked for.
        seconds: of the search alone, as the run recorded them.
        genes: how many numbers were searched.
        window: candidates in flight, as the manifest of the run says.
    """

    method: str
    seed: int
    steps: list[Step]
    quality: dict[int, float]
    items: int
    candidates: int
    seconds: float
    genes: int
    window: int

    @property
    def final(self) -> float:
        return self.quality[self.steps[-1].candidate]

    def at(self, items: float) -> float:
        """What the best known candidate is worth after so many item-evaluations; nan before the first one."""
        known = bisect_right(self.steps, items, key=lambda step: step.items)
        return self.quality[self.steps[known - 1].candidate] if known else np.nan


def table_config(landscape_name: str, landscape: Landscape, models: Path, budget: int) -> dict[str, Any]:
    """The config of a search on a landscape."""
    middle = round(1 / len(landscape.sources), 6)
    return {
        "name": "table",
        "models": {
            "base": str(models / "base"),
            "sources": {source: str(models / source) for source in landscape.sources},
        },
        "space": {
            "operator": "task_arithmetic",
            "split": [],
            "patterns": patterns(landscape),
            "parameters": {"weight": {"low": landscape.low, "high": landscape.high, "initial": middle}},
        },
        "evaluators": {
            task: {"use": "quality.table_model:TableScores", "landscape": landscape_name, "task": task}
            for task in landscape.tasks
        },
        "objectives": {
            "normalize": "none",
            "terms": [f"{task}.{NAMES[landscape.kind]}" for task in landscape.tasks],
        },
        "search": {"budget": budget, "finalists": 1, "window": 1},
        "cluster": {"pool": "local", "workers": 1, "check_memory": False},
    }


def models_for(landscape_name: str, landscape: Landscape, folder: Path) -> Path:
    """The tiny models of a landscape, made once."""
    models = folder / Path(landscape_name).stem
    if not (models / landscape.sources[-1] / "config.json").exists():
        write_models(landscape, models)
    return models


def search(config: dict[str, Any], method: Method, seed: int, results: Path) -> RunFolder | str:
    """Run a search, or find the one that was run; a line that says why, where the program cannot do it."""
    name = f"{method.name}-{seed}"
    path = results / f"{name}.yaml"
    changed = {**with_method(config, method), "seed": seed, "results": str(results)}
    text = yaml.safe_dump(changed, sort_keys=False)
    if (results / name).exists():
        finished = (results / name / "report.md").exists()
        if finished and path.exists() and yaml.safe_load(path.read_text()) == yaml.safe_load(text):
            return RunFolder(results / name)
        # It was cut off, or had other settings, such as a smaller budget or fewer items.
        _certified_file(results, method, seed).unlink(missing_ok=True)
        shutil.rmtree(results / name)
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        setup = check(load_config(path))
    except UserError as error:
        return str(error).splitlines()[0]
    quiet = Watcher(lambda _: None, lambda _: None)
    start(setup, lambda _, plan, __: LocalPool(plan), quiet, name)
    return RunFolder(results / name)


def table_curve(landscape_name: str, method: Method, seed: int, budget: int, folder: Path) -> Curve | str:
    """A search on a landscape, whose quality is known at every point."""
    landscape = load(landscape_name)
    models = models_for(landscape_name, landscape, folder / "models")
    config = table_config(landscape_name, landscape, models, budget)
    run = search(config, method, seed, folder / "tables" / Path(landscape_name).stem)
    if isinstance(run, str):
        return run
    replay = _replayed(run, method)
    found = _live_models(replay.setup, replay.seen, lambda model: quality(landscape, point_of(model, landscape)))
    return _curve(method, seed, run, replay, found)


def real_curve(config: dict[str, Any], method: Method, seed: int, folder: Path) -> Curve | str:
    """A search on real models; the best known candidates are then scored on the certify items."""
    run = search(config, method, seed, folder)
    if isinstance(run, str):
        return run
    replay = _replayed(run, method)
    known = _certified_file(folder, method, seed)
    if known.exists():
        found = {int(key): value for key, value in json.loads(known.read_text()).items()}
    else:
        found = _certified(replay.setup, replay.seen)
        known.write_text(json.dumps(found))
    return _curve(method, seed, run, replay, found)


@dataclass(frozen=True)
class _Replayed:
    """A run from its history.

    Attributes:
        seen: the best known candidates on the way.
        window: candidates in flight, as the manifest of the run says.
    """

    setup: Setup
    seen: Incumbents
    window: int


def _curve(method: Method, seed: int, run: RunFolder, replay: _Replayed, found: dict[int, float]) -> Curve:
    return Curve(
        method=method.name,
        seed=seed,
        steps=replay.seen.steps,
        quality=found,
        items=replay.seen.items,
        candidates=replay.seen.population.asked,
        seconds=Sessions(run.sessions).search_seconds,
        genes=len(replay.setup.space.genes),
        window=replay.window,
    )


def _certified_file(results: Path, method: Method, seed: int) -> Path:
    return results / f"{method.name}-{seed}.certified.json"


def _certified(setup: Setup, seen: Incumbents) -> dict[int, float]:
    """Candidate -> the objective on the certify items."""
    body = Evaluation(worker_plan(setup))
    found = {}
    for candidate in dict.fromkeys(step.candidate for step in seen.steps):
        outcome = body.run(Job(candidate, seen.population.candidate(candidate).recipe, "certify"))
        found[candidate] = seen.population.objective.value(outcome.metrics) if outcome.failure is None else np.inf
    return found


def _live_models(setup: Setup, seen: Incumbents, measure: Callable[[Any], float]) -> dict[int, float]:
    """Candidate -> what is measured of its merged model."""
    body = Evaluation(worker_plan(setup))
    found = {}
    for candidate in dict.fromkeys(step.candidate for step in seen.steps):
        body._merger.merge_into(seen.population.candidate(candidate).recipe, body._targets)
        found[candidate] = measure(body._model.model)
    return found


def _replayed(run: RunFolder, method: Method) -> _Replayed:
    setup = load_setup(run, Watcher(lambda _: None, lambda _: None))
    window = int(read_manifest(run)["window"])
    seen = Incumbents(make_population(setup, window), method.from_zero)
    replay_ordered(run.events(), seen.population, window, told=seen.told)
    return _Replayed(setup, seen, window)

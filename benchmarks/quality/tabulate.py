"""Evaluate real merges on a designed grid, once, so that optimisers can be compared on what comes out in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from quality.landscapes import POOLS, Kind, Table

from evaluators.base import Metric, Scores
from evaluators.likelihood import scoring
from evaluators.vision.image_classification import ImageClassification
from search.config import parse_config
from search.evaluation import Evaluation
from search.pool import Job
from search.recipe import Rule
from search.setup import check
from search.worker_plan import worker_plan
from search.yaml_source import YamlSource

if TYPE_CHECKING:
    import torch

LIMIT = 60
"""Most items per task and pool."""

HALVES = (("*layers.0.*", "*layers.1.*", "*embed*"), ("*",))
"""Tensors of the first group of a model with four layers; the second has the others."""

BOUNDS = (-0.2, 1.2)


class Margins(ImageClassification):
    """By how much the logit of the right class is above the best other one."""

    metrics: Mapping[str, Metric] = {"margin": Metric("maximize", help="right logit minus the best other one")}
    loss_metric = ""

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        for batch in self._batches(items):
            with scoring(model):
                logits, labels = self._logits(model, batch)
                right = logits.gather(1, labels[:, None])[:, 0]
                others = logits.scatter(1, labels[:, None], -np.inf).max(1).values
            values = (right - others).cpu().double().numpy()
            yield Scores(tuple(batch), {"margin": values}, np.ones(len(batch)))


def tabulate(family: str, folder: Path, count: int, to: Path) -> Path:
    """Evaluate a Sobol design of recipes of a family and write the table.

    The vision family has eight sources; those of digits and those of photographs share a weight each, so that its
    points have 2 groups x 3 weights as those of the text family do.
    """
    from scipy.stats import qmc

    config = yaml.safe_load((folder / "search.yaml").read_text())
    kind: Kind = "nll" if family == "text" else "margin"
    for section in config["evaluators"].values():
        section["limit"] = LIMIT
        if family == "vision":
            section["use"] = "quality.tabulate:Margins"
    metric = "nll" if family == "text" else "margin"
    config["objectives"] = {"normalize": "none", "terms": [f"{name}.{metric}" for name in config["evaluators"]]}
    config["cluster"] = {"pool": "local", "workers": 1}
    source = YamlSource(yaml.safe_dump(config, sort_keys=False), str(folder / "search.yaml"))
    setup = check(parse_config(source, folder.resolve()))
    body = Evaluation(worker_plan(setup))
    members = _members(family, list(setup.config.models.sources))
    names = tuple(members)
    dimension = 2 * len(names)
    low, high = BOUNDS
    design = qmc.scale(qmc.Sobol(dimension, seed=0).random(count), [low] * dimension, [high] * dimension)
    corners = [np.tile(np.eye(len(names))[index], 2) for index in range(len(names))]
    points = np.concatenate(
        [design, np.stack(corners), np.zeros((1, dimension)), np.full((1, dimension), 1 / len(names))]
    )
    collected: dict[str, dict[str, list[Any]]] = {}
    began = time.monotonic()
    for number, point in enumerate(points):
        recipe = setup.space.recipe(_rules(members, point.reshape(2, -1)))
        for pool in POOLS:
            outcome = body.run(Job(number, recipe, pool))  # type: ignore[arg-type]
            if outcome.failure is not None:
                raise SystemExit(f"point {number}: {outcome.failure.message}")
            for name, scores in outcome.scores.items():
                order = np.argsort(scores.items)
                collected.setdefault(name, {}).setdefault(pool, []).append(scores.values[metric][order])
        if (number + 1) % 16 == 0:
            print(f"{number + 1} of {len(points)} points, {time.monotonic() - began:.0f} s", flush=True)
    values = {
        task: {pool: np.stack(found).astype(np.float32) for pool, found in pools.items()}
        for task, pools in collected.items()
    }
    table = Table(2, names, low, high, kind, points, values)
    path = to / f"{family}.parquet"
    table.write(path)
    error, spread = table.left_out_errors()
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; error at points left out {error:.4f}, spread {spread:.4f}")
    return path


def _members(family: str, sources: list[str]) -> dict[str, list[str]]:
    """Weight -> the sources that have it."""
    if family == "text":
        return {source: [source] for source in sources}
    digits, overlays = {"digits", "negatives", "scans"}, {"overlays"}
    found = {
        "digits": [source for source in sources if source in digits],
        "overlays": [source for source in sources if source in overlays],
        "photos": [source for source in sources if source not in digits | overlays],
    }
    if not all(found.values()):
        third = len(sources) // 3
        found = {"a": sources[:third], "b": sources[third : 2 * third], "c": sources[2 * third :]}
    return found


def _rules(members: Mapping[str, list[str]], weights: Any) -> tuple[Rule, ...]:
    return tuple(
        Rule.model_validate(
            {
                "operator": "task_arithmetic",
                "tensors": pattern,
                "sources": {
                    source: {"weight": float(weight)}
                    for weight, sources in zip(row, members.values(), strict=True)
                    for source in sources
                },
            }
        )
        for pattern, row in zip(HALVES, weights, strict=True)
    )

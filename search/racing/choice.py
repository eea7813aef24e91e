"""Whether candidates of a config are scored on parts of the items, which the optimiser must be able to put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evaluators.base import Metric
from search.config import Config
from search.optimizer import OPTIMIZERS, PoolsParts
from search.racing.config import FitnessConfig


def estimate_faults(config: Config) -> Iterator[str]:
    """What is wrong with an item-response model as `search.fitness.estimate`."""
    fitness = config.search.fitness
    if _models_items(fitness) and not (fitness.racing or fitness.rotate):
        yield (
            f"{fitness.estimate} has no effect where candidates are scored on all items; set racing: true beside it, "
            "or leave it out"
        )


def rotate_faults(
    config: Config, optimizer: str, metrics: Mapping[str, Metric], *, begun: bool = False
) -> Iterator[str]:
    """What is wrong with `search.fitness.rotate: true`.

    Args:
        metrics: those that are known, as `<evaluator>.<metric>`.
        begun: whether it is the config of a run that exists, which may be older than a rule and goes on as it began.
    """
    fitness = config.search.fitness
    if not fitness.rotate:
        return
    if fitness.racing:
        yield "racing scores all candidates on the same items, rotate each on others; choose one of them"
    if not begun and _models_items(fitness):
        yield (
            f"estimate: {fitness.estimate} needs the same first items of every candidate, and a part has others; "
            "use control_variate or auto, or leave rotate out"
        )
    if config.constraints:
        yield "whether a constraint is kept cannot be seen on a few items; leave rotate out"
    for term in config.objectives.terms:
        if term.metric in metrics and not metrics[term.metric].per_item:
            yield f"'{term.metric}' has no value per item, so nothing is known of it part by part; leave rotate out"
    if not _one_optimiser_for_one_merge(config):
        yield "only a search of the whole genome for one best merge puts parts together, no front and no second stage"
    elif not _pools_parts(optimizer):
        yield (
            f"the optimizer '{optimizer}' takes every score as it is and cannot put those of different items together; "
            "use gaussian_process, or leave rotate out"
        )


def resolved_fitness(config: Config, optimizer: str, metrics: Mapping[str, Metric]) -> FitnessConfig:
    """`search.fitness` with what the rest of the config decides.

    Args:
        optimizer: its name, once `auto` is resolved.
    """
    found: dict[str, Any] = {"rotate": _rotates(config, optimizer, metrics)}
    # The scale that everything is measured with is not to be rough, and what comes before the base cannot be completed.
    if config.objectives.normalize == "parents" or config.search.order == "arrival":
        found["parents"] = 1.0
    return config.search.fitness.model_copy(update=found)


def _rotates(config: Config, optimizer: str, metrics: Mapping[str, Metric]) -> bool:
    """Whether candidates are scored on parts of the items; where the config leaves it open, if that serves it."""
    fitness = config.search.fitness
    if fitness.rotate is not None:
        return fitness.rotate
    if config.search.baselines_only:
        return False  # nothing puts parts together
    refused = fitness.racing or _models_items(fitness) or config.constraints
    open_to_it = _one_optimiser_for_one_merge(config) and not refused
    return open_to_it and _parts_tell_enough(config, metrics) and _pools_parts(optimizer)


def _parts_tell_enough(config: Config, metrics: Mapping[str, Metric]) -> bool:
    """Whether every metric of the objective has values per item, and none is bounded: merges differ by few right or
    wrong answers, which on a part are lost in chance (results/reference/search_quality_vision_answers.md)."""
    found = [metrics[term.metric] for term in config.objectives.terms]
    return all(metric.per_item and (metric.low is None or metric.high is None) for metric in found)


def _models_items(fitness: FitnessConfig) -> bool:
    """Whether metrics are estimated by an item-response model."""
    return fitness.estimate in ("p_irt", "gp_irt")


def _one_optimiser_for_one_merge(config: Config) -> bool:
    path = config.space.path
    return config.objectives.search != "pareto" and (path is None or path.stage != "after")


def _pools_parts(optimizer: str) -> bool:
    return optimizer in OPTIMIZERS.names() and hasattr(OPTIMIZERS.get(optimizer), PoolsParts.wants_all_items.__name__)

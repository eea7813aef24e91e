"""Whether the sections of a config agree: metrics that are given, a budget that suffices, a GPU that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evaluators.base import Evaluator, Metric
from search.config import Config, LoadedConfig
from search.errors import UserError, nearest
from search.faults import Faults
from search.machine import has_gpu
from search.pareto.pick import parse_pick, resolve
from search.racing.config import FitnessConfig
from search.yaml_source import Location


def check_budget(config: Config, faults: Faults) -> None:
    """Look for a budget below parents, base and one merge."""
    smallest = len(config.models.sources) + 2  # every parent, the base, and one more to compare
    if config.search.budget < smallest and not config.search.baselines_only:
        faults.add(
            ("search", "budget"),
            f"{config.search.budget} is too small; expected at least {smallest}: every parent, the base and one merge",
        )


def check_item_limit(
    config: Config, fitness: FitnessConfig, evaluators: Mapping[str, Evaluator], faults: Faults
) -> None:
    """Look for a limit of items below what parents, base and one merge take.

    Args:
        fitness: as the rest of the config decides it.
    """
    items = config.search.limits.item_evaluations
    if items is None:
        return
    total = sum(len(evaluator.items("search")) for evaluator in evaluators.values())
    # On parts a merge takes next to nothing, and parents may take a share.
    parents = len(config.models.sources) * (fitness.parents if fitness.rotate else 1)
    needed = math.ceil(total * (1 + parents + (not fitness.rotate)))
    if items < needed:
        faults.add(
            ("search", "limits", "item_evaluations"),
            f"{items} is too small; every parent, the base and one merge take at least {needed} search items",
        )


def check_gpus(config: Config, faults: Faults) -> None:
    """Look for GPUs that are asked for and not there."""
    cluster = config.cluster
    if cluster.address is None and not has_gpu() and (cluster.device.startswith("cuda") or cluster.gpus_per_worker):
        key = "device" if cluster.device.startswith("cuda") else "gpus_per_worker"
        faults.add(("cluster", key), "this machine has no GPU that CUDA or ROCm drives; use the CPU, or an address")
    if config.space.path is not None and cluster.gpus_per_worker > 1:
        faults.add(("space", "path"), "a path cannot be laid over several GPUs yet; set cluster.gpus_per_worker to 1")


def check_batches(config: Config, evaluators: Mapping[str, Evaluator], faults: Faults) -> None:
    """Look for candidates that are to share forward passes where no evaluator has any to share."""
    several = config.cluster.candidates_per_forward > 1
    if several and evaluators and not any(evaluator.plain_forward for evaluator in evaluators.values()):
        faults.add(
            ("cluster", "candidates_per_forward"),
            f"candidates share the forward passes of likelihood evaluators, and none of {', '.join(evaluators)} is "
            "one; set it to 1",
        )


def _check_racing(config: Config, metrics: Mapping[str, Metric], faults: Faults) -> None:
    if not config.search.fitness.racing:
        return
    for term in config.objectives.terms:
        if term.metric in metrics and not metrics[term.metric].per_item:
            evaluator = term.metric.partition(".")[0]
            others = [name for name, one in metrics.items() if one.per_item and name.partition(".")[0] == evaluator]
            instead = f"; use {' or '.join(others)} in the objectives" if others else ""
            faults.add(
                ("search", "fitness", "racing"),
                f"'{term.metric}' has no value per item, so candidates cannot be compared item by item{instead}, or "
                "leave racing out",
            )


def metrics_of(evaluators: Mapping[str, Evaluator]) -> dict[str, Metric]:
    """`<evaluator>.<metric>` -> what it means."""
    return {f"{name}.{metric}": meaning for name, e in evaluators.items() for metric, meaning in e.metrics.items()}


def check_metrics(loaded: LoadedConfig, metrics: Mapping[str, Metric], working: set[str], faults: Faults) -> None:
    """Look for metrics in objectives and constraints that no evaluator gives, or not as it is needed.

    Args:
        metrics: those that are known.
        working: evaluators that could be made.
    """
    config = loaded.config

    def look_at(metric: str, location: Location) -> None:
        evaluator = metric.partition(".")[0]
        # An evaluator that could not be made has been reported; its metrics are unknown, not wrong.
        if metric not in metrics and (evaluator in working or evaluator not in config.evaluators):
            faults.add(location, f"no evaluator gives '{metric}'{nearest(metric, metrics)}")

    for index, term in enumerate(config.objectives.terms):
        as_list = isinstance(loaded.source.data["objectives"], list)
        look_at(term.metric, ("objectives", index) if as_list else ("objectives", "terms", index))
    for index, constraint in enumerate(config.constraints):
        look_at(constraint.metric, ("constraints", index))
    try:
        wanted = parse_pick(config.objectives.pick)
        if working.issuperset(config.evaluators):
            resolve(wanted, metrics)
    except UserError as error:
        faults.add(("objectives", "pick"), str(error))
    _check_racing(config, metrics, faults)

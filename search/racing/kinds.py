"""Which fitness a config has."""

from __future__ import annotations

from collections.abc import Mapping

from evaluators.base import Evaluator
from search.racing.config import FitnessConfig
from search.racing.fitness import Fitness
from search.racing.front import FrontFitness
from search.racing.rotation import Rotation


def make_fitness(
    config: FitnessConfig, evaluators: Mapping[str, Evaluator], seed: int, window: int, *, front: bool
) -> Fitness | None:
    """The fitness of a config; None where every candidate is scored on all items.

    Args:
        front: whether a front is searched.
    """
    if config.rotate:
        return Rotation(config, evaluators, seed, window)
    if not config.racing:
        return None
    return FrontFitness(config, evaluators, seed, window) if front else Fitness(config, evaluators, seed, window)

"""Constraints before the default optimiser: what keeps them comes first, and the best of that is found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from search.objective import FAILED_LOSS, INFEASIBLE_LOSS
from search.optimizer import Problem, Result, Vector
from search.optimizers.gaussian_process import GaussianProcess

GENES = 6
MIDDLE = 0.75
START = np.full(GENES, 0.3)


def objective(point: Vector) -> float:
    return float(((point - MIDDLE) ** 2).sum())


def best_found(least: float, seed: int, fails: Callable[[Vector], bool] = lambda _: False) -> float:
    """The best feasible objective after 100 candidates, the mean of whose first two genes must be at least so large."""
    optimizer = GaussianProcess(Problem(START, 100, 1, seed, 0.1))
    optimizer.suggest(START)
    found = [np.inf]
    for _ in range(100):
        point = optimizer.ask()
        value, violation = objective(point), max(least - float(point[:2].mean()), 0.0) / least
        loss = INFEASIBLE_LOSS + violation if violation else value
        if fails(point):
            optimizer.tell_result(point, Result(FAILED_LOSS))
            continue
        optimizer.tell_result(point, Result(loss, (value,), violation, objective=value))
        found.append(value if not violation else np.inf)
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_a_start_that_violates_constraints_is_left_for_the_optimum(seed: int) -> None:
    assert best_found(0.7, seed) < 0.05 * objective(START)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_merge_at_the_edge_of_a_constraint_is_found(seed: int) -> None:
    least = 0.9
    at_edge = 2 * (least - MIDDLE) ** 2  # the nearest feasible point: both genes at the bound, the others free
    assert at_edge - 1e-9 <= best_found(least, seed) < at_edge + 0.05 * objective(START)


@pytest.mark.parametrize("seed", range(3))
def test_failures_among_infeasible_candidates_are_kept_away_from(seed: int) -> None:
    assert best_found(0.7, seed, lambda point: bool(point[2] < 0.2 or point[3] > 0.9)) < 0.05 * objective(START)

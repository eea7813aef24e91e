"""The surrogate over parts of the items, against the formulas of Gaussian processes written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import check_grad

from search.surrogate import Observed, Surrogate

Vector = NDArray[np.float64]
PARTS = 4


def random_data(seed: int, n: int = 30, d: int = 3) -> Observed:
    random = np.random.default_rng(seed)
    points = random.uniform(-1, 1, (n, d))
    shares = np.eye(PARTS)[random.integers(PARTS, size=n)]
    shares[::5] = 1 / PARTS
    return Observed(points, shares, random.normal(size=n))


def kernel(one: Vector, own: Vector, two: Vector, other: Vector, sizes: Vector) -> float:
    """Covariance of what is measured at two points with two shares of the parts, from the model's definition."""
    quadratic, rest, length, level, share, _ = sizes
    d = len(one)
    shape = quadratic * (1 + 3 / d * float(one @ two)) ** 2 / 4
    shape += rest * float(np.exp(-3 / d * ((one - two) ** 2).sum() / (2 * length**2)))
    total = 0.0
    for a in range(PARTS):
        for b in range(PARTS):
            total += own[a] * other[b] * (shape + (a == b) * (share * shape + level))
    return total


def by_hand(data: Observed, point: Vector, sizes: Vector) -> tuple[float, float]:
    """Mean and standard deviation of the mean over all parts at a point."""
    everywhere = np.full(PARTS, 1 / PARTS)
    rows = list(zip(data.points, data.parts, strict=True))
    matrix = np.array([[kernel(x, s, y, t, sizes) for y, t in rows] for x, s in rows])
    matrix += np.eye(len(rows)) * (sizes[5] + 1e-6)
    cross = np.array([kernel(point, everywhere, y, t, sizes) for y, t in rows])
    middle, spread = data.losses.mean(), data.losses.std()
    mean = cross @ np.linalg.solve(matrix, (data.losses - middle) / spread)
    variance = kernel(point, everywhere, point, everywhere, sizes) - cross @ np.linalg.solve(matrix, cross)
    return float(mean * spread + middle), float(np.sqrt(variance) * spread)


@pytest.mark.parametrize("learn", [False, True])
def test_predictions_are_those_of_the_gaussian_process_written_out(learn: bool) -> None:
    data = random_data(1)
    surrogate = Surrogate(3)
    surrogate.fit(data, sizes=learn)
    places = np.random.default_rng(2).uniform(-1, 1, (5, 3))
    expected = [by_hand(data, place, np.exp(surrogate.logs)) for place in places]
    assert surrogate.mean(places) == pytest.approx([mean for mean, _ in expected], abs=1e-6)
    bounds = [mean - 1.7 * deviation for mean, deviation in expected]
    assert surrogate.bound(places, 1.7) == pytest.approx(bounds, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.3])
def test_the_slope_is_that_of_the_bound(weight: float) -> None:
    surrogate = Surrogate(3)
    surrogate.fit(random_data(3))
    value: Callable[[Vector], float] = lambda x: surrogate.bound_and_slope(x, weight)[0]  # noqa: E731
    slope: Callable[[Vector], Vector] = lambda x: surrogate.bound_and_slope(x, weight)[1]  # noqa: E731
    for place in np.random.default_rng(4).uniform(-1, 1, (5, 3)):
        assert value(place) == pytest.approx(surrogate.bound(place[None], weight)[0], abs=1e-8)
        assert check_grad(value, slope, place) < 1e-4


def test_sizes_that_were_learned_are_more_probable_than_those_around_them() -> None:
    random = np.random.default_rng(5)
    points = random.uniform(-1, 1, (40, 2))
    shares = np.eye(PARTS)[random.integers(PARTS, size=40)]
    losses = (points**2).sum(1) + shares @ random.normal(size=PARTS) + random.normal(0, 0.1, 40)
    losses += (shares @ random.normal(0, 0.3, (PARTS, 2)) * points).sum(1)
    data = Observed(points, shares, losses)
    surrogate = Surrogate(2)
    for _ in range(20):  # each fit goes on where the last one ended
        surrogate.fit(data)

    def evidence(logs: Vector) -> float:
        sizes = np.exp(logs)
        rows = list(zip(points, shares, strict=True))
        matrix = np.array([[kernel(x, s, y, t, sizes) for y, t in rows] for x, s in rows])
        matrix += np.eye(40) * (sizes[5] + 1e-6)
        target = (losses - losses.mean()) / losses.std()
        usual, doubt = np.log([1.0, 0.1, 1.0, 0.1, 0.05, 1e-3]), np.array([2.0, 2.0, 0.7, 2.0, 2.0, 2.0])
        prior = -0.5 * (((logs - usual) / doubt) ** 2).sum()
        return float(-0.5 * target @ np.linalg.solve(matrix, target) - 0.5 * np.linalg.slogdet(matrix)[1] + prior)

    found = evidence(surrogate.logs)
    for index in range(6):
        for step in (-0.3, 0.3):
            moved = surrogate.logs.copy()
            moved[index] += step
            assert evidence(moved) < found + 1e-3


def test_an_optimum_is_found_although_no_two_candidates_have_the_same_part() -> None:
    random = np.random.default_rng(6)
    points = random.uniform(-1, 1, (60, 2))
    parts = np.arange(60) % PARTS
    levels, tilts = random.normal(0, 5, PARTS), random.normal(0, 0.5, (PARTS, 2))
    tilts -= tilts.mean(0)
    optimum = np.array([0.3, -0.4])
    losses = ((points - optimum) ** 2).sum(1) + levels[parts] + (tilts[parts] * points).sum(1)
    surrogate = Surrogate(2)
    surrogate.fit(Observed(points, np.eye(PARTS)[parts], losses))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2), -1).reshape(-1, 2)
    assert grid[np.argmin(surrogate.mean(grid))] == pytest.approx(optimum, abs=0.06)
    assert len(set(parts[np.argsort(losses)[:10]])) == 1  # what looks best is only of the easiest part

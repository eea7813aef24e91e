"""Stopping early is wrong as rarely as promised, however often is looked."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from evaluators.base import Scores
from search.racing.bounds import betting_log_wealth, mixture_log_evidence
from search.racing.config import FitnessConfig
from search.racing.ladder import Ladder, item_order
from search.racing.race import Race, Reference

ALPHA = 0.05
LIMIT = -math.log(ALPHA)


def rate(stopped: int, runs: int) -> tuple[float, float]:
    """Share, and three standard errors of one that is `ALPHA`."""
    return stopped / runs, 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


@pytest.mark.parametrize("wrong", [0.1, 0.3, 0.5])
def test_betting_rarely_stops_an_equal_candidate_whatever_is_drawn(wrong: float) -> None:
    generator, runs, stopped = np.random.default_rng(1), 600, 0
    for _ in range(runs):
        half = int(100 * wrong)
        population = np.concatenate([np.ones(half), -np.ones(half), np.zeros(200 - 2 * half)])
        draws = generator.permutation(population)[:199]
        stopped += bool((betting_log_wealth(draws, -1.0, 200) >= LIMIT).any())
    share, slack = rate(stopped, runs)
    assert share <= ALPHA + slack


def test_betting_finds_a_worse_candidate() -> None:
    generator = np.random.default_rng(2)
    found = []
    for _ in range(100):
        draws = generator.permutation(np.concatenate([np.ones(120), -np.ones(40), np.zeros(240)]))
        wealth = betting_log_wealth(draws, -1.0, 400)
        found.append(int(np.argmax(wealth >= LIMIT)) if (wealth >= LIMIT).any() else 400)
    assert np.median(found) < 150


def test_betting_knows_when_the_rest_cannot_make_up_for_the_past() -> None:
    draws = np.concatenate([np.full(60, 0.9), np.full(40, -0.1)])
    assert betting_log_wealth(draws, -1.0, 100)[-1] == math.inf


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_the_mixture_rarely_stops_an_equal_candidate_under_many_looks(shape: str) -> None:
    generator, runs, stopped, total = np.random.default_rng(3), 1500, 0, 400
    for _ in range(runs):
        draws = generator.normal(size=total) if shape == "normal" else generator.exponential(size=total)
        draws = draws - draws.mean()
        for count in (20, 30, 45, 68, 102, 153, 230, 345):
            seen = draws[:count]
            variance = float(seen.var(ddof=1)) * (1 + 2 / count) / count * (1 - count / total)
            if mixture_log_evidence(float(seen.mean()), variance, 0.3) >= LIMIT:
                stopped += 1
                break
    share, slack = rate(stopped, runs)
    assert share <= ALPHA + slack


def test_the_mixture_is_the_integral_over_half_normal_alternatives() -> None:
    mean, variance, scale = 0.3, 0.02, 0.5
    grid = np.linspace(0, 5, 200_001)
    prior = 2 / (scale * math.sqrt(2 * math.pi)) * np.exp(-(grid**2) / (2 * scale**2))
    ratio = np.exp((mean * grid - grid**2 / 2) / variance)
    integral = float(np.trapezoid(prior * ratio, grid))
    assert mixture_log_evidence(mean, variance, scale) == pytest.approx(math.log(integral), rel=1e-6)


def scores_of(values: np.ndarray, weights: np.ndarray | None = None) -> Scores:
    weights = np.ones(len(values)) if weights is None else weights
    return Scores(tuple(f"i{k}" for k in range(len(values))), {"loss": values}, weights)


def reference(total: int, influence: dict[str, np.ndarray], low: float | None) -> Reference:
    names = list(influence)
    return Reference(
        loss=0.0,
        coefficients={name: {"loss": 1 / len(names)} for name in names},
        influence=influence,
        mean_weights=dict.fromkeys(names, 1.0),
        blocks=total,
        totals=dict.fromkeys(names, total),
        low=low,
        scale=0.3,
        alpha=ALPHA,
    )


@pytest.mark.parametrize("low", [None, -1.0])
def test_a_race_over_two_evaluators_rarely_stops_an_equal_candidate_and_stops_a_bad_one(low: float | None) -> None:
    generator, total, runs = np.random.default_rng(4), 200, 400
    stopped = caught = 0
    sizes = (20, 40, 80, 160, 200)
    race_of = tuple({"a": size, "b": size} for size in sizes)
    for _ in range(runs):
        own = {name: (generator.random(total) < 0.5).astype(float) for name in "ab"}
        # Better on one and worse on the other, the same in all.
        other = {"a": generator.permutation(own["a"]), "b": generator.permutation(own["b"])}
        race = Race(race_of, reference(total, {name: 0.5 * other[name] for name in "ab"}, low))
        stopped += any(
            race.stops(rung, {name: scores_of(own[name][:size]) for name in "ab"}) for rung, size in enumerate(sizes)
        )
        worse = {name: np.maximum(other[name], generator.random(total) < 0.5) for name in "ab"}
        caught += any(
            race.stops(rung, {name: scores_of(worse[name][:size]) for name in "ab"}) for rung, size in enumerate(sizes)
        )
    share, slack = rate(stopped, runs)
    assert share <= ALPHA + slack
    assert caught > 0.9 * runs


def test_the_ladder_is_nested_takes_something_of_everyone_and_ends_with_all() -> None:
    ladder = Ladder.of({"a": 100, "b": 1000, "c": 37}, FitnessConfig(smallest=5, first=0.02))
    sizes = [ladder.sizes(rung) for rung in range(len(ladder.rungs))]
    assert all(size >= 5 for size in sizes[0].values())
    assert sizes[-1] == {"a": 100, "b": 1000, "c": 37}
    for before, after in itertools.pairwise(sizes):
        assert all(after[name] > before[name] for name in before)
    assert Ladder.of({"a": 4}, FitnessConfig(smallest=5)).rungs == (4,)


def test_evaluators_with_few_items_are_scored_whole_on_every_rung_and_the_others_are_raced() -> None:
    ladder = Ladder.of({"size": 1, "few": 8, "a": 100, "b": 200}, FitnessConfig(smallest=8))
    sizes = [ladder.sizes(rung) for rung in range(len(ladder.rungs))]
    assert sizes[0] == {"size": 1, "few": 8, "a": 8, "b": 16}
    assert all((size["size"], size["few"]) == (1, 8) for size in sizes)
    assert sizes[-1] == {"size": 1, "few": 8, "a": 100, "b": 200}
    assert Ladder.of({"size": 1, "few": 8}, FitnessConfig(smallest=8)).sizes(0) == {"size": 1, "few": 8}


@pytest.mark.parametrize("low", [None, -1.0])
def test_what_is_known_of_one_item_counts_in_a_race_and_misleads_nobody(low: float | None) -> None:
    generator, total, runs = np.random.default_rng(5), 200, 400
    stopped = caught = 0
    sizes = (20, 40, 80, 160, 200)
    rungs = tuple({"a": size, "size": 1} for size in sizes)
    other = (generator.random(total) < 0.6).astype(float)
    against = replace(
        reference(total, {"a": other, "size": np.array([0.5])}, low),
        coefficients={"a": {"loss": 1.0}, "size": {"loss": 1.0}},
        totals={"a": total, "size": 1},
    )

    def race(own: np.ndarray, size: float) -> bool:
        order = generator.permutation(total)
        drawn = Race(rungs, replace(against, influence={"a": other[order], "size": np.array([0.5])}))
        scores = [{"a": scores_of(own[order][:seen]), "size": scores_of(np.array([size]))} for seen in sizes]
        return any(drawn.stops(rung, one) for rung, one in enumerate(scores))

    equal = other.copy()
    equal[np.flatnonzero(other == 0)[:30]] = 1.0  # worse by 0.15 on the items, as much better in size
    for _ in range(runs):
        stopped += race(equal, 0.35)
        caught += race(other, 0.9)
    share, slack = rate(stopped, runs)
    assert share <= ALPHA + slack
    assert caught > 0.9 * runs


def test_the_order_of_items_depends_on_seed_name_and_ids_and_not_on_how_they_are_listed() -> None:
    items = tuple(f"item{k}" for k in range(50))
    order = item_order(1, "a", items)
    assert sorted(order) == sorted(items)
    assert order == item_order(1, "a", tuple(reversed(items)))
    assert len({order, item_order(2, "a", items), item_order(1, "b", items), item_order(1, "a", items[1:])}) == 4

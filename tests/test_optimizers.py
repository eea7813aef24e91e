"""Optimisers repeat themselves, search, and the ones that cannot carry a run are refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from search.errors import UserError
from search.nevergrad_box import NevergradBox
from search.optimizer import OPTIMIZERS, MakeOptimizer, Problem, Vector
from search.optimizers import optimizer_named

REPLAYED = [
    *OPTIMIZERS.names(),
    "TwoPointsDE",
    "DE",
    "OnePlusOne",
    "PSO",
    "TBPSA",
    "CMA",
    "DiscreteOnePlusOne",
]


def problem(dimension: int = 8, seed: int = 1, budget: int = 120, window: int = 4) -> Problem:
    return Problem(np.full(dimension, 0.3), budget, window, seed, 0.1)


def asked(name: str, setting: Problem, optimum: float = 0.7) -> list[Vector]:
    """All asks of a run on a sphere with the window full."""
    optimizer = optimizer_named(name)(setting)
    optimizer.suggest(setting.start)
    open_: list[Vector] = []
    points: list[Vector] = []
    for _ in range(setting.budget):
        open_.append(optimizer.ask())
        points.append(open_[-1])
        if len(open_) == setting.window:
            told = open_.pop(0)
            optimizer.tell(told, float(((told - optimum) ** 2).sum()))
    return points


@pytest.mark.parametrize("name", REPLAYED)
def test_the_same_seed_and_order_gives_the_same_bits(name: str) -> None:
    first, second = asked(name, problem()), asked(name, problem())
    assert [p.tobytes() for p in first] == [p.tobytes() for p in second]


@pytest.mark.parametrize("name", REPLAYED)
def test_every_point_lies_in_the_unit_box_and_the_suggestion_comes_first(name: str) -> None:
    points = asked(name, problem())
    assert np.allclose(points[0], 0.3)
    assert all(((point >= 0) & (point <= 1)).all() and point.dtype == np.float64 for point in points)


def test_another_seed_gives_other_points() -> None:
    first = asked("diagonal_cma", problem(seed=1))
    second = asked("diagonal_cma", problem(seed=2))
    assert not np.array_equal(first[5], second[5])


def test_asks_do_not_depend_on_string_hashing_or_on_the_process() -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import hashlib, test_optimizers as t\n"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in t.asked('diagonal_cma', t.problem()))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("dimension", "window", "step", "budget"),
    [(1, 4, 0.1, 200), (2, 1, 0.5, 300), (5, 8, 0.3, 800), (17, 4, 0.1, 400), (18, 4, 0.9, 400), (99, 16, 0.1, 600)],
)
def test_diagonal_cma_asks_what_nevergrads_cma_asks_with_its_settings(
    dimension: int, window: int, step: float, budget: int
) -> None:
    import cma
    import nevergrad

    def theirs(setting: Problem) -> NevergradBox:
        configured = nevergrad.families.ParametrizedCMA(
            diagonal=True,
            scale=setting.step * 8 / 0.195,
            inopts={
                "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
                **dict.fromkeys(("tolx", "tolfun", "tolfunhist"), 0),
                **dict.fromkeys(("tolflatfitness", "tolstagnation"), 10**9),
            },
        )
        return NevergradBox(configured, setting)

    def asked_by(make: MakeOptimizer) -> list[bytes]:
        setting = Problem(np.random.RandomState(dimension).rand(dimension), budget, window, 7, step)
        optimizer, order = make(setting), random.Random(3)
        for suggested in (setting.start, np.full(dimension, 0.9)):
            optimizer.suggest(suggested)
        open_: list[Vector] = []
        points = []
        for _ in range(budget):
            open_.append(optimizer.ask())
            points.append(open_[-1].tobytes())
            if len(open_) >= window:
                told = open_.pop(order.randrange(len(open_)))
                optimizer.tell(told, float(((told - 0.7) ** 2).sum()))
        return points

    assert asked_by(optimizer_named("diagonal_cma")) == asked_by(theirs)


def test_diagonal_cma_takes_all_results_at_the_end_of_a_budget_and_goes_on_when_it_is_extended() -> None:
    setting = problem(dimension=5, budget=600, window=16)
    optimizer = optimizer_named("diagonal_cma")(setting)
    means = []
    for _ in range(3):  # a search of 200, extended twice
        open_: list[Vector] = []
        losses = []
        for number in range(200 + setting.window):
            if number < 200:
                open_.append(optimizer.ask())
            if number >= setting.window:
                told = open_.pop(0)
                losses.append(float(((told - 0.7) ** 2).sum()))
                optimizer.tell(told, losses[-1])
        means.append(sum(losses) / len(losses))
    assert means[2] < 0.5 * means[1] < 0.25 * means[0]


def test_diagonal_cma_finds_the_optimum_that_random_search_misses() -> None:
    setting = problem(dimension=20, budget=600)

    def best(name: str) -> float:
        return min(float(((p - 0.7) ** 2).sum()) for p in asked(name, setting))

    assert best("diagonal_cma") < 0.1 * best("random_search")


def test_diagonal_cma_takes_more_genes_than_pycmas_default_rule_allows() -> None:
    points = asked("diagonal_cma", problem(dimension=320, budget=60, window=16))
    assert len(points) == 60


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NGOpt", "crashes in mid-run"),
        ("NgIohTuned", "crashes in mid-run"),
        ("MetaModel", "crashes in mid-run"),
        ("Cobyla", "foreign minimiser"),
        ("SQP", "foreign minimiser"),
        ("NelderMead", "foreign minimiser"),
        ("ScrHammersleySearch", "before the first result"),
    ],
)
def test_optimisers_that_crash_hang_or_do_not_search_are_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(UserError, match="refused") as refused:
        optimizer_named(name)
    assert why in str(refused.value)
    assert "use diagonal_cma" in str(refused.value)


@pytest.mark.parametrize("name", ["LognormalDiscreteOnePlusOne", "SPSA", "MemeticDE", "MultiDS"])
def test_optimisers_that_do_not_repeat_or_do_not_run_in_parallel_are_refused_when_made(name: str) -> None:
    with pytest.raises(UserError, match="refused"):
        optimizer_named(name)(problem())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of methods that meet a tiny budget
def test_every_optimiser_of_nevergrads_registry_runs_or_is_refused_with_a_way_out() -> None:
    import nevergrad

    run, refused = [], {}
    for name in sorted(nevergrad.optimizers.registry):
        try:
            points = asked(name, problem(dimension=4, budget=12, window=2))
        except UserError as error:
            refused[name] = str(error)
        else:
            assert all(point.shape == (4,) and (point >= 0).all() and (point <= 1).all() for point in points), name
            run.append(name)
    assert len(run) > 200, len(run)
    for name, said in refused.items():
        assert said.startswith(f"optimizer '{name}' is refused: "), said
        assert "use diagonal_cma" in said


def test_cma_of_nevergrad_is_refused_where_its_step_size_rule_fails() -> None:
    with pytest.raises(UserError, match="from 300 genes on"):
        optimizer_named("CMA")(problem(dimension=300))


def test_a_typo_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'diagonal_cma'"):
        optimizer_named("diagonal_cmaa")


@pytest.mark.parametrize("name", ["diagonal_cma", "TwoPointsDE", "OnePlusOne"])
def test_one_gene_is_enough(name: str) -> None:
    points = asked(name, problem(dimension=1, budget=80))
    assert all(point.shape == (1,) for point in points)
    assert min(abs(float(point[0]) - 0.7) for point in points) < 0.05

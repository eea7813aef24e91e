"""Merge first, then its path: two searches behind one optimiser."""

from __future__ import annotations

import numpy as np
import pytest

from search.genome import Gene
from search.optimizer import LearnsFromGeneration0, MakeOptimizer, Optimizer, Problem, Result, Vector
from search.optimizers import optimizer_named
from search.paths.stages import in_two_stages

PARAMETERS, PATH, BUDGET, WINDOW = 3, 2, 40, 4
START = np.array([0.3, 0.4, 0.5, 0.7, 0.3])
OURS = ("diagonal_cma", "random_search", "natural_niches", "map_elites", "nsga2")
GENES = tuple(Gene(f"g{index}", 0.0, 1.0, float(x)) for index, x in enumerate(START))


def problem(seed: int = 5) -> Problem:
    return Problem(START, BUDGET, WINDOW, seed, 0.1, GENES)


def loss(point: Vector) -> float:
    return float(((point - np.array([0.6, 0.2, 0.8, 0.1, 0.9])) ** 2).sum())


def asks_of(optimizer: Optimizer, budget: int = BUDGET) -> list[Vector]:
    """All asks of a search with a window of candidates in flight."""
    optimizer.suggest(START)
    asked: list[Vector] = []
    told = 0
    while told < budget:
        while len(asked) < budget and len(asked) - told < WINDOW:
            asked.append(optimizer.ask())
        optimizer.tell(asked[told], loss(asked[told]))
        told += 1
    return asked


@pytest.fixture(params=["diagonal_cma", "random_search", "OnePlusOne"])
def make(request: pytest.FixtureRequest) -> MakeOptimizer:
    return optimizer_named(request.param)


def test_first_only_parameters_move_then_only_the_path_from_the_best_so_far(make: MakeOptimizer) -> None:
    asked = asks_of(in_two_stages(make, PARAMETERS, 0.6)(problem()))
    first, second = np.array(asked[:24]), np.array(asked[24:])
    assert (asked[0] == START).all()
    assert (first[:, PARAMETERS:] == START[PARAMETERS:]).all()
    assert len(np.unique(first[:, :PARAMETERS], axis=0)) > 10
    known = min(asked[: 24 - WINDOW + 1], key=loss)  # the others were in flight when the second search began
    assert (second[:, :PARAMETERS] == known[:PARAMETERS]).all()
    assert (second[0] == known).all()
    assert len(np.unique(second[:, PARAMETERS:], axis=0)) > 5


def test_the_same_seed_and_results_ask_the_same(make: MakeOptimizer) -> None:
    staged = in_two_stages(make, PARAMETERS, 0.5)
    first, again = asks_of(staged(problem())), asks_of(staged(problem()))
    assert np.array(first).tobytes() == np.array(again).tobytes()


def test_an_extended_search_goes_on_where_it_was(make: MakeOptimizer) -> None:
    staged = in_two_stages(make, PARAMETERS, 0.5)
    assert np.array(asks_of(staged(problem()), 60))[:BUDGET].tobytes() == np.array(asks_of(staged(problem()))).tobytes()


class Notes:
    """An optimiser that wants results, and notes them."""

    def __init__(self, start: Vector) -> None:
        self.start = start
        self.results: list[tuple[Vector, Result]] = []

    def suggest(self, point: Vector) -> None: ...

    def ask(self) -> Vector:
        return self.start

    def tell(self, point: Vector, loss: float) -> None:
        raise AssertionError("it wants results")

    def tell_result(self, point: Vector, result: Result) -> None:
        self.results.append((point, result))


def test_results_reach_the_search_that_asked_and_stopped_ones_are_no_best() -> None:
    made: list[Notes] = []

    def make(problem: Problem) -> Optimizer:
        made.append(Notes(problem.start))
        assert len(problem.genes) == len(problem.start)
        return made[-1]

    staged = in_two_stages(make, PARAMETERS, 0.05)(problem())
    early = [staged.ask(), staged.ask()]
    staged.tell_result(early[0], Result(0.1, censored=True))  # type: ignore[attr-defined]
    late = staged.ask()
    staged.tell_result(early[1], Result(0.5))  # type: ignore[attr-defined]
    staged.tell_result(late, Result(0.2, (0.2,)))  # type: ignore[attr-defined]
    assert [result.loss for _, result in made[0].results] == [0.1, 0.5]
    assert [result.losses for _, result in made[1].results] == [(0.2,)]
    assert [len(point) for notes in made for point, _ in notes.results] == [PARAMETERS, PARAMETERS, PATH]


class Members(Notes):
    """An optimiser that starts from generation 0."""

    def __init__(self, start: Vector) -> None:
        super().__init__(start)
        self.taken: list[Vector] = []

    def take_member(self, point: Vector, result: Result) -> None:
        self.taken.append(point)


def test_members_of_generation_0_reach_the_first_search_and_the_second_begins_at_the_best_of_them() -> None:
    made: list[Members] = []

    def make(problem: Problem) -> Optimizer:
        made.append(Members(problem.start))
        return made[-1]

    staged = in_two_stages(make, PARAMETERS, 0.05)(problem())
    assert isinstance(staged, LearnsFromGeneration0)
    best = START + np.array([0.1, 0.2, 0.3, 0.0, 0.0])
    staged.take_member(START, Result(0.5))
    staged.take_member(best, Result(0.2))
    staged.take_member(START + 0.1, Result(0.1))  # on another path
    assert np.array_equal(made[0].taken, [START[:PARAMETERS], best[:PARAMETERS]])
    for point in [staged.ask(), staged.ask()]:
        staged.tell_result(point, Result(0.3))  # type: ignore[attr-defined]
    assert np.array_equal(staged.ask()[:PARAMETERS], best[:PARAMETERS])


def test_two_stages_take_members_only_if_their_optimiser_does() -> None:
    staged = {name: in_two_stages(optimizer_named(name), PARAMETERS, 0.5)(problem()) for name in OURS}
    has = {name: isinstance(one, LearnsFromGeneration0) for name, one in staged.items()}
    assert has == {name: isinstance(optimizer_named(name)(problem()), LearnsFromGeneration0) for name in OURS}
    assert has["natural_niches"]
    assert not has["diagonal_cma"]

"""What holds for every registered optimiser, on numbers and on genes of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from driving import content
from landscape import Landscape, Shuffled, population
from test_driver import drive

from evaluators.base import Scores
from search.errors import UserError
from search.genome import Gene
from search.objective import FAILED_LOSS, Term
from search.optimizer import OPTIMIZERS, LearnsFromGeneration0, LearnsFromResults, Optimizer, Problem, Result, Vector
from search.optimizers import optimizer_named
from search.optimizers.map_elites import MapElites
from search.optimizers.natural_niches import NaturalNiches
from search.pool import Job

OURS = OPTIMIZERS.names()
ALL = [*OURS, "TwoPointsDE", "OnePlusOne", "DiscreteOnePlusOne"]
ITEMS = 30
TARGETS = np.random.default_rng(5).uniform(0.4, 1.0, ITEMS)


def genes_of(kind: str) -> tuple[Gene, ...]:
    """Four groups of numbers, or the same with operators and sources to choose from."""
    genes = []
    for group in range(4):
        if kind == "mixed":
            genes.append(Gene(f"{group}/operator", 0, 2, 0, "choice", None, ("x", "y", "z"), group))
            genes.append(Gene(f"{group}/a.included", 0, 1, 0.75, "bool", position=group))
            genes.append(Gene(f"{group}/steps", 1, 5, 2, "int", position=group))
        genes += [Gene(f"{group}/{source}.weight", 0, 1, 0.4, position=group) for source in "ab"]
    return tuple(genes)


def problem(kind: str = "numbers", seed: int = 1, objectives: int = 1, budget: int = 150) -> Problem:
    genes = genes_of(kind)
    start = np.array([gene.coordinate(gene.initial) for gene in genes])
    terms = tuple(Term(f"e.m{index}", 1.0, 1) for index in range(objectives))
    return Problem(start, budget, 5, seed, 0.1, genes, objectives, terms)


def result_of(setting: Problem, point: Vector) -> Result:
    """Every item has an own target for the numbers; z and taking part are right, and four steps."""
    away = np.zeros(ITEMS)
    for gene, x in zip(setting.genes, point, strict=True):
        value = gene.value(x)
        if gene.kind == "float":
            away += (float(value) - TARGETS) ** 2 / len(setting.genes)
        elif gene.kind == "int":
            away += 0.02 * abs(4 - float(value))
        else:
            away += 0.1 * (value not in ("z", True))
    values = {f"m{index}": np.roll(away, index) * (1 + index * TARGETS) for index in range(setting.objectives)}
    losses = tuple(float(value.mean()) for value in values.values())
    scores = Scores(tuple(map(str, range(ITEMS))), values, np.ones(ITEMS))
    return Result(float(np.mean(losses)), losses, scores={"e": scores}, metrics={})


def tell(optimizer: Optimizer, point: Vector, result: Result) -> None:
    if isinstance(optimizer, LearnsFromResults):
        optimizer.tell_result(point, result)
    else:
        optimizer.tell(point, result.loss)


Log = list[tuple[str, Vector, Result | None]]


def run(name: str, setting: Problem, judge: Callable[[int, Result], Result] = lambda _, r: r, order: int = 0) -> Log:
    """Asks and tells of a search with the window full; with an order, results come as that seed says."""
    optimizer, shuffle = optimizer_named(name)(setting), random.Random(order)
    optimizer.suggest(setting.start)
    open_: list[Vector] = []
    log: Log = []
    for number in range(setting.budget):
        open_.append(optimizer.ask())
        log.append(("ask", open_[-1].copy(), None))
        if len(open_) == setting.window:
            told = open_.pop(shuffle.randrange(len(open_)) if order else 0)
            result = judge(number, result_of(setting, told))
            tell(optimizer, told, result)
            log.append(("tell", told, result))
    for told in open_:  # the end of a budget: results are told without an ask between them
        tell(optimizer, told, result_of(setting, told))
    return log


def asks(log: Log) -> list[bytes]:
    return [point.tobytes() for what, point, _ in log if what == "ask"]


@pytest.mark.parametrize("kind", ["numbers", "mixed"])
@pytest.mark.parametrize("name", ALL)
def test_asks_lie_in_the_box_start_with_the_suggestion_and_replay_bit_by_bit(name: str, kind: str) -> None:
    setting = problem(kind, budget=90)
    log = run(name, setting, order=3)
    assert asks(log)[0] == setting.start.tobytes()
    again = optimizer_named(name)(setting)
    again.suggest(setting.start)
    for what, point, result in log:
        if what == "ask":
            asked = again.ask()
            assert asked.tobytes() == point.tobytes()
            assert asked.dtype == np.float64
            assert asked.shape == setting.start.shape
            assert ((asked >= 0) & (asked <= 1)).all()
        else:
            assert result is not None
            tell(again, point, result)
    assert asks(run(name, problem(kind, seed=2, budget=90))) != asks(run(name, problem(kind, budget=90)))


SEARCHES = [name for name in [*OURS, "TwoPointsDE"] if name != "random_search"]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "numbers") for name in SEARCHES), ("natural_niches", "mixed"), ("map_elites", "mixed")]
)
def test_an_easy_optimum_is_found_that_random_search_misses(name: str, kind: str) -> None:
    def best(one: str) -> float:
        logs = [run(one, problem(kind, seed, budget=300)) for seed in range(2)]
        return float(np.mean([min(result.loss for _, _, result in log if result) for log in logs]))

    # The items disagree on the numbers: nothing is better than their mean.
    least = float(TARGETS.var()) * (8 / (20 if kind == "mixed" else 8))
    assert best(name) - least < 0.75 * (best("random_search") - least)


@pytest.mark.parametrize("name", ALL)
def test_failed_infeasible_and_censored_results_do_not_stop_a_search(name: str) -> None:
    def judge(number: int, result: Result) -> Result:
        if number % 3 == 0:
            return Result(FAILED_LOSS)
        if number % 3 == 1:
            return Result(1e9 + 1, result.losses, 1.0, scores=result.scores)
        return Result(result.loss, result.losses, censored=True, scores={})

    assert len(asks(run(name, problem("mixed", budget=60), judge))) == 60


def members(optimizer: Optimizer) -> list[bytes]:
    if isinstance(optimizer, NaturalNiches):
        return [member.point.tobytes() for member in optimizer.members]
    assert isinstance(optimizer, MapElites)
    return [elite.point.tobytes() for archive in optimizer.archives for elite in archive.elites.values()]


POPULATIONS = ["natural_niches", "map_elites"]


@pytest.mark.parametrize("objectives", [1, 3])
@pytest.mark.parametrize("name", POPULATIONS)
def test_only_whole_results_of_candidates_that_worked_enter_an_archive(name: str, objectives: int) -> None:
    setting = problem(objectives=objectives, budget=60)
    optimizer = optimizer_named(name)(setting)
    kept: set[bytes] = set()
    for number in range(60):
        point = optimizer.ask()
        whole = result_of(setting, point)
        if number % 4 == 0:
            tell(optimizer, point, Result(-1.0, (-1.0,) * objectives, censored=True, scores=whole.scores))
        elif number % 4 == 1:
            tell(optimizer, point, Result(FAILED_LOSS))
        else:
            tell(optimizer, point, whole)
            kept.add(point.tobytes())
    found = members(optimizer)
    assert found
    assert set(found) <= kept


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NGOpt", "crashes"),
        ("Cobyla", "foreign"),
        ("SPSA", "refused"),
        ("LognormalDiscreteOnePlusOne", "repeat"),
    ],
)
def test_what_cannot_carry_a_search_is_refused_for_mixed_genes_too(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        optimizer_named(name)(problem("mixed"))


@pytest.mark.parametrize("name", POPULATIONS)
def test_feasible_members_replace_infeasible_ones(name: str) -> None:
    setting = problem(budget=200)
    optimizer = optimizer_named(name, {"archive": 5} if name == "natural_niches" else {"cells": 2})(setting)
    for number in range(60):
        point = optimizer.ask()
        whole = result_of(setting, point)
        feasible = number >= 30
        tell(optimizer, point, whole if feasible else Result(1e9, whole.losses, 2.0, scores=whole.scores))
        if number == 29:
            before = set(members(optimizer))
    assert before
    if isinstance(optimizer, NaturalNiches):
        assert not before & set(members(optimizer))
    else:
        assert isinstance(optimizer, MapElites)
        filled = [e.violation for archive in optimizer.archives for e in archive.elites.values()]
        assert filled.count(0.0) > len(filled) / 2


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_population_starts_from_what_generation_0_measured(name: str) -> None:
    made = population(budget=60, optimizer=name)
    assert isinstance(optimizer_named(name)(problem()), LearnsFromGeneration0)
    landscape = Landscape()
    while True:
        candidate = made.ask()
        assert candidate is not None
        if candidate.genome is not None:
            break
        outcome = landscape.run(Job(candidate.id, candidate.recipe, "search"))
        made.tell(candidate.id, None if outcome.failure else outcome.metrics, outcome.scores)
    assert made._optimizer is not None
    points = {tuple(np.frombuffer(point)) for point in members(made._optimizer)}
    wanted = made._space.suggest({"a": 1.0, "b": 0.0, "c": 0.0})
    assert wanted is not None
    assert wanted.coordinates in points


@pytest.mark.parametrize("name", ["full_cma", *POPULATIONS])
def test_a_history_is_the_same_on_any_workers_and_after_any_death(name: str, tmp_path: Path) -> None:
    whole = content(drive(tmp_path / "whole", Shuffled(1, 0), optimizer=name))
    assert content(drive(tmp_path / "four", Shuffled(4, 3), optimizer=name)) == whole
    drive(tmp_path / "cut", Shuffled(3, 7), stop_after=77, optimizer=name)
    assert content(drive(tmp_path / "cut", Shuffled(2, 8), optimizer=name)) == whole

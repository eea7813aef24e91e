"""Fronts, hypervolume, the knee, expressions that pick, and NSGA-II."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from evaluators.base import Metric, Options
from evaluators.efficiency.cost import Cost
from search.candidate import Candidate
from search.config import Constraint, ObjectivesConfig
from search.errors import UserError
from search.genome import Gene
from search.objective import make_objective
from search.optimizer import Problem, Result
from search.optimizers import optimizer_named
from search.optimizers.nsga2 import Nsga2
from search.pareto.dominance import crowding, front, ranks, spread
from search.pareto.finals import front_sentence
from search.pareto.front import Front, FrontPoint, FrontTracker, front_of
from search.pareto.hypervolume import hypervolume, reference_point
from search.pareto.knee import knee
from search.pareto.pick import choose, parse_pick, resolve
from search.pareto.recorded import pick_trial
from search.recipe import ModelRef, Recipe, Rule
from search.store.events import Trial
from search.verdict import Row

Point = tuple[float, ...]

# Few different values, so that there are ties.
grids = st.integers(2, 3).flatmap(
    lambda terms: st.lists(st.tuples(*[st.integers(0, 5).map(float)] * terms), min_size=1, max_size=14)
)


def beats(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@given(grids, st.data())
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_of_peeling_off_front_by_front_feasibility_first(
    points: list[Point], data: st.DataObject
) -> None:
    violations = [float(data.draw(st.sampled_from([0, 0, 1, 2]))) for _ in points]

    def dominates(i: int, j: int) -> bool:
        if violations[i] or violations[j]:
            return violations[i] < violations[j]
        return beats(points[i], points[j])

    left, expected, rank = set(range(len(points))), {}, 0
    while left:
        peeled = {i for i in left if not any(dominates(j, i) for j in left)}
        expected |= dict.fromkeys(peeled, rank)
        left -= peeled
        rank += 1
    found = ranks(np.array(points), np.array(violations))
    assert found.tolist() == [expected[i] for i in range(len(points))]


@given(grids)
@settings(max_examples=150, deadline=None)
def test_the_front_is_what_nothing_dominates_each_point_once(points: list[Point]) -> None:
    expected = sorted({p for p in points if not any(beats(q, p) for q in points)})
    found = front(np.array(points))
    assert [points[i] for i in found] == expected
    assert all(points.index(points[i]) == i for i in found)


@given(grids)
@settings(max_examples=150, deadline=None)
def test_crowding_is_the_distance_of_the_neighbours_term_by_term(points: list[Point]) -> None:
    points = sorted(set(points))
    expected = [0.0] * len(points)
    for term in range(len(points[0])):
        order = sorted(range(len(points)), key=lambda i: (points[i][term], i))
        width = points[order[-1]][term] - points[order[0]][term]
        if width == 0:
            continue
        expected[order[0]] = expected[order[-1]] = math.inf
        for before, here, after in zip(order, order[1:], order[2:], strict=False):
            expected[here] += (points[after][term] - points[before][term]) / width
    assert crowding(np.array(points)).tolist() == pytest.approx(expected)


@given(grids)
@settings(max_examples=150, deadline=None)
def test_the_hypervolume_is_the_number_of_unit_cells_that_are_dominated(points: list[Point]) -> None:
    cells = itertools.product(range(5), repeat=len(points[0]))
    expected = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells)
    assert hypervolume(np.array(points), [5.0] * len(points[0])) == pytest.approx(expected)


def test_the_reference_point_is_the_worst_parent_and_a_tenth_of_the_distance_to_the_best() -> None:
    assert reference_point([(0.0, 4.0), (1.0, 2.0)]) == pytest.approx((1.1, 4.2))
    assert reference_point([(2.0, 0.0), (2.0, 0.0)]) == pytest.approx((2.2, 0.1))


def test_a_front_that_is_thinned_keeps_its_ends_and_stays_spread() -> None:
    line = np.array([[x, 1 - x] for x in (0.0, 0.01, 0.02, 0.5, 0.51, 1.0)])
    kept = spread(line, 3)
    assert kept[0] == 0
    assert kept[-1] == 5
    assert kept[1] in (3, 4)
    assert spread(line, 10) == list(range(6))


def test_the_knee_bulges_most_whatever_the_units() -> None:
    losses = np.array([[0.0, 10.0], [0.2, 3.0], [0.5, 2.5], [1.0, 0.0]])
    assert knee(losses) == 1
    assert knee(losses * [1000.0, 0.001] + [7.0, -3.0]) == 1
    assert knee(losses[:1]) == 0
    three = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.3, 0.3, 0.3], [0.5, 0.2, 0.5]])
    assert knee(three) == 3


def named(*points: tuple[float, float]) -> Front:
    """Accuracy (larger is better) and attack success, in [0, 1]."""
    made = [
        FrontPoint(id_, "search", (-accuracy, asr), {"clean.accuracy": accuracy, "trigger.asr": asr})
        for id_, (accuracy, asr) in enumerate(points)
    ]
    return Front("select", ("clean.accuracy", "trigger.asr"), tuple(made))


METRICS = ["clean.accuracy", "trigger.asr", "trigger.accuracy2"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("accuracy>=0.9, min asr", 1),
        ("min trigger.asr", 0),
        ("max accuracy", 3),
        ("asr <= 0.35, max clean.accuracy", 2),
        ("accuracy >= 0.93, knee", 2),
        ("knee", 1),
    ],
)
def test_an_expression_picks_the_point_that_it_says(text: str, chosen: int) -> None:
    front = named((0.5, 0.0), (0.92, 0.1), (0.95, 0.3), (0.96, 0.9))
    assert choose(front, resolve(parse_pick(text), METRICS)).candidate == chosen


def test_of_points_that_are_equally_short_the_one_with_the_smallest_losses_is_picked() -> None:
    front = Front(
        "select",
        ("a.nll", "b.nll", "cost.layers"),
        tuple(
            FrontPoint(id_, "search", losses, dict(zip(("a.nll", "b.nll", "cost.layers"), losses, strict=True)))
            for id_, losses in enumerate([(0.1, 0.9, 3.0), (0.3, 0.3, 3.0), (0.2, 0.2, 4.0), (0.9, 0.1, 3.0)])
        ),
    )
    assert choose(front, parse_pick("a.nll <= 0.5, min cost.layers")).candidate == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("accuracy >= 0.9", "found no goal, expected exactly one of min, max and knee"),
        ("min asr, max accuracy", "found 2 goals"),
        ("accuracy > 0.9, min asr", "'>' is no relation of a bound; expected <= or >="),
        ("accuracy >= much, min asr", "'much' is not a number"),
        ("accuracy >= nan, min asr", "'nan' is not a number"),
        ("minimise asr", "cannot read 'minimise asr'"),
        ("min asrr", "no evaluator gives 'asrr'; did you mean 'asr'"),
    ],
)
def test_an_expression_that_says_nothing_is_answered_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(parse_pick(text), METRICS)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bounds_that_nothing_keeps_are_answered_with_the_closest_point() -> None:
    with pytest.raises(UserError, match=r"keeps clean.accuracy >= 0.99; the closest is trial 1 .*accuracy 0.92"):
        choose(named((0.5, 0.0), (0.92, 0.1)), resolve(parse_pick("accuracy >= 0.99, min asr"), METRICS))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_front_that_is_followed_is_that_of_all_trials(rows: list[tuple[int, int, bool]]) -> None:
    terms = ObjectivesConfig.model_validate({"search": "pareto", "terms": ["e.a", "e.b"]})
    bound = Constraint(metric="e.c", relation="<=", bound=0.5)
    directions = {name: Metric("minimize") for name in ("e.a", "e.b", "e.c")}
    tracker = FrontTracker(make_objective(terms, [bound], directions), parents=2)
    trials, origins = [], {0: "parent:x", 1: "parent:y"}
    for id_, (a, b, broken) in enumerate([(0, 4, False), (4, 0, False), *rows]):
        trials.append(Trial(id_, "search", {"e.a": float(a), "e.b": float(b), "e.c": float(broken)}))
        tracker.note(trials[-1], origins.setdefault(id_, "search"))
    expected = front_of(trials, tracker.objective, origins, "search")
    assert tracker.front() == expected
    assert tracker.hypervolume == pytest.approx(expected.hypervolume())


def test_what_a_race_stopped_is_on_no_front_and_what_it_estimated_is_said() -> None:
    terms = ObjectivesConfig.model_validate({"terms": ["e.a", "e.b"], "search": "pareto", "normalize": "none"})
    directions = {name: Metric("minimize") for name in ("e.a", "e.b")}
    objective = make_objective(terms, [], directions)
    rows = [(0, 4, False), (4, 0, False), (1, 1, True), (2, 2, False)]
    trials = [
        Trial(id_, "search", {"e.a": float(a), "e.b": float(b)}, censored=stopped, scored=20 if id_ > 1 else None)
        for id_, (a, b, stopped) in enumerate(rows)
    ]
    origins = {0: "parent:x", 1: "parent:y", 2: "search", 3: "search"}
    found = front_of(trials, objective, origins, "search")
    assert {point.candidate for point in found.points} == {0, 1, 3}
    tracker = FrontTracker(objective, parents=2)
    for trial in trials:
        tracker.note(trial, origins[trial.candidate])
    assert tracker.hypervolume == found.hypervolume()
    models = {"base": ModelRef(path="/base")}
    recipe = Recipe(base="base", models=models, rules=(Rule(operator="linear", sources={"base": {"weight": 1.0}}),))
    candidates = [Candidate(id_, origin, recipe) for id_, origin in origins.items()]
    picked = pick_trial("a <= 3, min b", trials, objective, directions, candidates)
    assert picked.candidate == 3
    assert "on the search items, estimated from 20 of them" in picked.sentence
    assert "estimated" not in pick_trial("min b", trials, objective, directions, candidates).sentence


def test_a_candidate_of_another_search_with_the_number_of_the_winner_is_not_the_winner() -> None:
    terms = ObjectivesConfig.model_validate({"terms": ["e.a", "e.b"], "search": "pareto", "normalize": "none"})
    objective = make_objective(terms, [], {name: Metric("minimize") for name in ("e.a", "e.b")})

    def row(label: str, candidate: int, a: float, b: float, arm: str = "") -> Row:
        return Row(label, candidate, (a + b) / 2, 0.0, 0.0, {"e.a": a, "e.b": b}, arm=arm)

    rows = [row("placebo", 7, 9, 9, "placebo"), row("base", 3, 5, 5), row("random_search", 3, 1, 1, "random_search")]
    said = front_sentence(objective, [*rows, row("found merge (trial 7)", 7, 2, 3)], 7, "Chosen.")
    assert "it is dominated by random_search:" in said
    assert "e.a 2.0000 (best of the others 1.0000, random_search)" in said
    said = front_sentence(objective, [rows[0], rows[1], row("found merge (trial 7)", 7, 2, 3)], 7, "Chosen.")
    assert "it dominates 2 of 2" in said


def test_layers_that_repeat_cost_layers_but_no_parameters() -> None:
    import torch

    layer, last = torch.nn.Linear(3, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.ModuleList([layer, layer, last]))
    (scores,) = Cost(Options()).evaluate(model, ["model-search"])
    assert {name: values.tolist() for name, values in scores.values.items()} == {
        "parameters": [24.0],
        "bytes": [48.0],
        "layers": [3.0],
    }


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"search": "pareto", "terms": ["e.a"]}, "needs two terms or more"),
        ({"terms": ["e.a", "e.b"], "pick": "min e.a"}, "pick chooses from a front; add search: pareto"),
    ],
)
def test_objectives_that_make_no_front_are_refused(objectives: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectivesConfig.model_validate(objectives)


def zdt1(x: NDArray[np.float64]) -> Point:
    g = 1 + 9 * float(x[1:].mean())
    return float(x[0]), g * (1 - math.sqrt(float(x[0]) / g))


def zdt2(x: NDArray[np.float64]) -> Point:
    g = 1 + 9 * float(x[1:].mean())
    return float(x[0]), g * (1 - (float(x[0]) / g) ** 2)


def play(name: str, function: object, *, seed: int, budget: int = 300, dimension: int = 10, window: int = 4) -> list:  # type: ignore[type-arg]
    """(point, losses) of all asks, with the window full; fails sometimes."""
    optimizer = optimizer_named(name)(Problem(np.full(dimension, 0.5), budget, window, seed, 0.1, (), 2))
    optimizer.suggest(np.full(dimension, 0.5))
    open_, told = [], []
    for number in range(budget):
        open_.append(optimizer.ask())
        if len(open_) == window:
            point = open_.pop(0)
            losses = function(point)  # type: ignore[operator]
            told.append((point, losses))
            result = Result(sum(losses), losses) if number % 11 else Result(2e9)
            if isinstance(optimizer, Nsga2):
                optimizer.tell_result(point, result)
            else:
                optimizer.tell(point, result.loss)
    return told


@pytest.mark.parametrize("function", [zdt1, zdt2])
def test_nsga2_dominates_more_than_random_search(function: object) -> None:
    def volume(name: str, seed: int) -> float:
        return hypervolume(np.array([losses for _, losses in play(name, function, seed=seed)]), [4.0, 4.0])

    for seed in range(3):
        assert volume("nsga2", seed) > 1.2 * volume("random_search", seed)


def test_nsga2_asks_the_same_bits_again_and_others_with_another_seed() -> None:
    first, again, other = (play("nsga2", zdt1, seed=seed, budget=120) for seed in (1, 1, 2))
    assert [point.tobytes() for point, _ in first] == [point.tobytes() for point, _ in again]
    assert first[9][0].tolist() != other[9][0].tolist()


def test_nsga2_goes_for_feasible_points_first() -> None:
    """The losses pull to 0, the constraint wants the first gene at 0.6 or more."""
    optimizer = Nsga2(Problem(np.full(4, 0.2), 200, 1, 0, 0.1, (), 2))
    kept = []
    for _ in range(200):
        point = optimizer.ask()
        violation = max(0.6 - float(point[0]), 0.0)
        kept.append(violation == 0)
        optimizer.tell_result(point, Result(0.0, (float(point[0]), float(point[1:].sum())), violation))
    assert np.mean(kept[-60:]) > 0.6
    assert np.mean(kept[-60:]) > np.mean(kept[:12])


def test_nsga2_draws_choices_anew_and_leaves_no_gene_outside_the_box() -> None:
    genes = (
        Gene("a", 0, 1, 0.5),
        Gene("b", 0, 1, 0.5, "bool"),
        Gene("c", 0, 3, 1, "choice", choices=("x", "y", "z")),
        Gene("d", 0, 9, 3, "int"),
    )
    optimizer = Nsga2(Problem(np.full(4, 0.5), 300, 1, 0, 0.1, genes, 2))
    seen: set[object] = set()
    for number in range(300):
        point = optimizer.ask()
        assert ((point >= 0) & (point <= 1)).all()
        values = [gene.value(x) for gene, x in zip(genes, point.tolist(), strict=True)]
        if number > 150:
            seen.add((values[1], values[2]))
        optimizer.tell_result(point, Result(0.0, (float(point[0]), 1.0 - float(point[0]))))
    assert len(seen) == 6


def test_a_result_that_was_stopped_early_does_not_enter_the_population() -> None:
    told, untold = (Nsga2(Problem(np.full(3, 0.5), 100, 1, 0, 0.1, (), 2)) for _ in range(2))
    for number in range(60):
        point, same = told.ask(), untold.ask()
        assert point.tobytes() == same.tobytes()
        losses = (float(point[0]), float(point[1]))
        if number % 5 == 0:
            told.tell_result(point, Result(0.0, losses, censored=True))
            continue
        told.tell_result(point, Result(0.0, losses))
        untold.tell_result(point, Result(0.0, losses))

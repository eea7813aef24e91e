"""Natural niches and MAP-Elites against references by hand, brute force and another library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_optimizer_contract import problem, result_of

from evaluators.base import Scores
from search.gene_mixing import GeneMixing
from search.genome import Gene
from search.item_shares import ItemTable, attraction, competition, scaled
from search.objective import Term
from search.optimizer import Problem, Result, Vector
from search.optimizers import optimizer_named
from search.optimizers.map_elites import Elite, MapElites
from search.optimizers.natural_niches import NaturalNiches

unit = st.floats(0, 1)
shares_and_capacities = st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
    lambda size: st.tuples(arrays(np.float64, size, elements=unit), arrays(np.float64, size[1], elements=unit))
)


@given(shares_and_capacities, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_competition_and_attraction_are_what_loops_over_items_and_members_say(
    given_: tuple[np.ndarray, np.ndarray], alpha: float
) -> None:
    shares, capacities = given_
    members, items = shares.shape
    totals = [sum(shares[k, j] for k in range(members)) for j in range(items)]
    fitness = competition(shares, capacities, alpha, 1e-3)
    for i in range(members):
        by_hand = sum(capacities[j] * shares[i, j] / (totals[j] ** alpha + 1e-3) for j in range(items))
        assert fitness[i] == pytest.approx(by_hand)
        wanted = attraction(i, shares, capacities, 1e-3)
        for other in range(members):
            by_hand = sum(
                capacities[j] / (totals[j] + 1e-3) * max(shares[other, j] - shares[i, j], 0) for j in range(items)
            )
            assert wanted[other] == pytest.approx(by_hand)


def test_the_only_one_that_solves_an_item_is_worth_more_than_two_that_share_as_many() -> None:
    """By hand: three items of a third each; A and B share the first, C has the second alone."""
    shares = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    fitness = competition(shares, np.full(3, 1 / 3))
    assert fitness == pytest.approx([1 / 6, 1 / 6, 1 / 3])
    assert attraction(0, shares, np.full(3, 1 / 3)) == pytest.approx([0, 0, 1 / 3])


def result(values: dict[str, list[float]], weights: list[float], losses: tuple[float, ...] = (0.0,)) -> Result:
    items = tuple(f"i{number}" for number in range(len(weights)))
    scores = Scores(items, {name: np.array(found) for name, found in values.items()}, np.array(weights))
    return Result(0.0, losses, scores={"e": scores})


def test_rows_of_the_table_are_larger_where_better_and_capacities_follow_weights() -> None:
    table = ItemTable((Term("e.acc", 3.0, -1), Term("e.nll", 1.0, 1), Term("f.only", 4.0, 1)))
    row = table.row(result({"acc": [1.0, 0.0], "nll": [2.0, 5.0]}, [1.0, 3.0], (0.0, 0.0, 0.7)))
    assert row is not None
    assert row.tolist() == [1.0, 0.0, -2.0, -5.0, -0.7]
    assert table.capacities == pytest.approx(np.array([0.75, 2.25, 0.25, 0.75, 4.0]) / 8)
    assert scaled(np.array([row, row + np.eye(5)[1]])).tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_items_are_known_from_the_first_candidate_that_has_them_and_capacities_follow() -> None:
    table = ItemTable((Term("e.nll", 1.0, 1), Term("f.nll", 3.0, 1)))

    def row(items: str, values: list[float]) -> np.ndarray | None:
        """Item `a` of e weighs 1, b 2, and so on; f has the same."""
        scores = Scores(tuple(items), {"nll": np.array(values)}, np.array(["abcd".index(i) + 1.0 for i in items]))
        return table.row(Result(0.0, (0.0, 0.0), scores={"e": scores, "f": scores}))

    assert row("ab", [1.0, np.nan]) is None, "a score that is not finite"
    assert len(table.capacities) == 0
    first = row("ba", [1.0, 2.0])
    assert first is not None
    assert first.tolist() == [-1, -2, -1, -2]
    assert table.capacities == pytest.approx(np.array([2, 1, 6, 3]) / 3 / 4)
    fewer = row("a", [5.0])
    assert fewer is not None
    assert np.array_equal(fewer, [np.nan, -5, np.nan, -5], equal_nan=True)
    more = row("adb", [3.0, 4.0, 9.0])
    assert more is not None
    assert more.tolist() == [-9, -3, -9, -3, -4, -4]
    assert table.capacities == pytest.approx(np.array([2, 1, 6, 3, 4, 12]) / 7 / 4)
    assert row("", []) is None, "nothing was scored"


def test_a_term_without_values_per_item_stays_one_item() -> None:
    table = ItemTable((Term("e.acc", 1.0, -1), Term("g.only", 1.0, 1)))
    assert table.row(result({"acc": [1.0]}, [1.0], (0.0, 0.3))) is not None
    known = table.row(Result(0.0, (0.0, 0.4)))
    assert known is not None
    assert np.array_equal(known, [np.nan, -0.4], equal_nan=True)


Scored = dict[str, float]


def fitness_by_hand(members: list[Scored], capacities: dict[str, float], alpha: float) -> list[float]:
    """Fitness of members that lack items, with dictionaries and loops."""
    shares = shares_by_hand(members)
    resources = resources_by_hand(shares)
    counted = sum(capacities[item] for item, resource in resources.items() if resource > 0)
    found = []
    for own in shares:
        worth = sum(capacities[item] * share / (resources[item] ** alpha + 1e-9) for item, share in own.items())
        room = sum(capacities[item] for item in own if resources[item] > 0)
        found.append(worth / (room / counted) if room > 0 else 0.0)
    return found


def shares_by_hand(members: list[Scored]) -> list[Scored]:
    shares: list[Scored] = [{} for _ in members]
    for item in sorted({item for member in members for item in member}):
        values = [member[item] for member in members if item in member]
        for member, own in zip(members, shares, strict=True):
            if item in member:
                width = max(values) - min(values)
                own[item] = (member[item] - min(values)) / width if width > 0 else 0.0
    return shares


def resources_by_hand(shares: list[Scored]) -> Scored:
    resources = {}
    for item in {item: None for own in shares for item in own}:
        having = [own[item] for own in shares if item in own]
        resources[item] = sum(having) / len(having) * len(shares)
    return resources


def attraction_by_hand(first: int, members: list[Scored], capacities: dict[str, float]) -> list[float]:
    shares = shares_by_hand(members)
    resources = resources_by_hand(shares)
    counted = sum(capacities[item] for item, resource in resources.items() if resource > 0)
    found = []
    for other in shares:
        common = [item for item in other if item in shares[first] and resources[item] > 0]
        room = sum(capacities[item] for item in common)
        gains = [
            capacities[item] * max(other[item] - shares[first][item], 0) / (resources[item] + 1e-9) for item in common
        ]
        found.append(sum(gains) / (room / counted) if room > 0 else 0.0)
    return found


incomplete = st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
    lambda size: st.tuples(
        arrays(np.float64, size, elements=st.sampled_from([np.nan, 0.0, 0.25, 0.5, 1.0, -3.0])),
        arrays(np.float64, size[1], elements=st.sampled_from([0.1, 0.5, 1.0])),
    )
)


@given(incomplete, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("error")
def test_members_that_lack_items_compete_and_attract_as_loops_say(
    given_: tuple[np.ndarray, np.ndarray], alpha: float
) -> None:
    rows, capacities = given_
    members = [{str(j): float(x) for j, x in enumerate(row) if np.isfinite(x)} for row in rows]
    named = {str(j): float(x) for j, x in enumerate(capacities)}
    shares = scaled(rows)
    assert competition(shares, capacities, alpha) == pytest.approx(fitness_by_hand(members, named, alpha))
    for first in range(len(rows)):
        wanted = attraction(first, shares, capacities, out=np.empty_like(shares))
        assert wanted == pytest.approx(attraction_by_hand(first, members, named))


def test_an_item_that_only_one_member_has_makes_it_neither_better_nor_worse() -> None:
    rows = np.random.default_rng(0).random((4, 6))
    more = np.column_stack([rows, [np.nan, np.nan, 0.3, np.nan]])
    before = competition(scaled(rows), np.ones(6))
    assert competition(scaled(more), np.ones(7)) == pytest.approx(before)


def partial_results(count: int, seed: int) -> list[tuple[Vector, Result]]:
    """Candidates of a race: nested subsets of items, mostly growing, some ending early, and whole ones between them."""
    generator = np.random.default_rng(seed)
    order = [str(number) for number in generator.permutation(24)]
    found = []
    for number in range(count):
        size = 24 if number % 11 == 3 else min(24, 4 + 4 * (number // 12) - 2 * (number % 5 == 1))
        values = generator.normal(size=size) + (number % 3) * (np.arange(size) % 3 == number % 3)
        weights = np.array([1.0 + int(item) % 3 for item in order[:size]])
        scores = Scores(tuple(order[:size]), {"m0": values}, weights)
        loss = float(np.average(values, weights=weights))
        found.append((generator.random(8), Result(loss, (loss,), float(number % 7 == 0), scores={"e": scores})))
    return found


def test_the_archive_of_a_race_is_what_loops_say_and_holds_members_of_every_size() -> None:
    optimizer = optimizer_named("natural_niches", {"archive": 5})(problem())
    assert isinstance(optimizer, NaturalNiches)
    archive: list[tuple[Vector, Scored, Result]] = []
    weights: dict[str, float] = {}
    entered = set()
    for point, told in partial_results(80, 0):
        optimizer.tell_result(point, told)
        scores = told.scores["e"]
        weights |= dict(zip(scores.items, map(float, scores.weights), strict=True))
        archive.append((point, dict(zip(scores.items, map(float, -scores.values["m0"]), strict=True)), told))
        if len(archive) > 5:
            rivals = [k for k, (_, _, one) in enumerate(archive) if one.violation == 0] or list(range(len(archive)))
            capacities = {item: weight / sum(weights.values()) for item, weight in weights.items()}
            fitness = [0.0] * len(archive)
            for k, found in zip(rivals, fitness_by_hand([archive[k][1] for k in rivals], capacities, 1.0), strict=True):
                fitness[k] = found
            worst = [(one.violation, -fitness[k], one.loss, k) for k, (_, _, one) in enumerate(archive)]
            del archive[max(worst)[-1]]
        assert [m.point.tobytes() for m in optimizer.members] == [point.tobytes() for point, _, _ in archive]
        if archive[-1][0] is point:
            entered.add(len(scores.items))
    assert len(entered) >= 6, "candidates with more items than all members enter, and those with fewer"


def test_a_search_over_growing_subsets_asks_the_same_again_bit_by_bit() -> None:
    def asked() -> list[bytes]:
        optimizer = optimizer_named("natural_niches", {"archive": 5})(problem())
        assert isinstance(optimizer, NaturalNiches)
        points = []
        for _, told in partial_results(60, 1):
            points.append(optimizer.ask())
            optimizer.tell_result(points[-1], told)
        return [point.tobytes() for point in points]

    assert asked() == asked()


def fill(optimizer: NaturalNiches | MapElites, count: int) -> list[Vector]:
    """The points of a short search."""
    points = []
    for _ in range(count):
        points.append(optimizer.ask())
        optimizer.tell_result(points[-1], result_of(problem("mixed"), points[-1]))
    return points


def test_a_pure_child_has_the_first_layers_of_one_parent_and_differs_behind_them() -> None:
    setting = problem("mixed")
    optimizer = optimizer_named("natural_niches", {"crossover": "pure", "archive": 6})(setting)
    assert isinstance(optimizer, NaturalNiches)
    points = fill(optimizer, 40)
    positions = GeneMixing(setting).positions
    shared = []
    for number in range(6, 40):
        child = points[number]
        same = [np.cumprod(child == other).astype(bool) for other in points[:number]]
        shared.append(max(len(set(positions[prefix])) for prefix in same))
        for prefix in same:
            assert not prefix.all()
    # Four positions, of which the split keeps none to three: most children share a prefix, some nothing.
    assert sum(count > 0 for count in shared) > len(shared) / 2
    assert max(shared) <= 4


def layered(groups: int, each: int = 40, first: int = 0) -> Problem:
    """Numbers before the layers and in them, equally many everywhere."""
    genes = tuple(Gene(f"{at}/{n}", 0, 1, 0.5, position=first + at) for at in range(groups) for n in range(each))
    return Problem(np.full(groups * each, 0.5), 100, 4, 3, 0.1, genes)


@pytest.mark.parametrize(("first", "cuts"), [(0, {0, 2, 3, 4}), (1, {1, 2, 3, 4, 5})])
def test_a_pure_child_changes_parents_before_everything_or_where_a_layer_is_spared(first: int, cuts: set[int]) -> None:
    setting = layered(5, each=3, first=first)
    optimizer = optimizer_named("natural_niches", {"crossover": "pure"})(setting)
    assert isinstance(optimizer, NaturalNiches)
    positions, parent = GeneMixing(setting).positions, np.full(15, 0.3)
    found = [int(positions[optimizer._crossed(parent, np.full(15, 0.6)) != parent].min()) for _ in range(300)]
    assert set(found) == cuts
    # All alike: children run half of the layers on average, since the one behind the embedding alone is not among them.
    assert min(map(found.count, cuts)) > 300 / len(cuts) / 2


def test_a_pure_child_moves_as_far_with_few_genes_as_with_all_up_to_three_times_the_step() -> None:
    setting = layered(20)
    optimizer = optimizer_named("natural_niches", {"crossover": "pure", "mutation": 0.01})(setting)
    assert isinstance(optimizer, NaturalNiches)
    parent = np.full(800, 0.5)
    seen = set()
    for _ in range(100):
        step = optimizer._crossed(parent, parent) - parent
        changed = int((step != 0).sum())
        wanted = 0.01 * min(np.sqrt(800 / changed), 3.0)
        assert np.std(step[step != 0]) == pytest.approx(wanted, rel=0.35)  # of 40 genes or more
        seen.add(changed)
    assert len(seen) > 10


def test_a_published_child_lies_between_its_parents_at_turned_ratios_but_for_its_mutation() -> None:
    setting = problem()
    optimizer = optimizer_named("natural_niches", {"mutation": 0.0})(setting)
    assert isinstance(optimizer, NaturalNiches)
    first, second = np.zeros(8), np.ones(8)
    for _ in range(20):
        child = optimizer._crossed(first, second)
        ratios = np.unique(child)
        assert len(ratios) <= 2
        if len(ratios) == 2:
            assert ratios.sum() == pytest.approx(1.0)
            assert len(np.unique(np.diff(child)[np.diff(child) != 0])) == 1  # one split


def test_the_archive_keeps_specialists_that_are_worse_on_the_whole() -> None:
    """Two kinds of items; most members are good at the first, one alone at the second."""
    setting = problem()
    optimizer = optimizer_named("natural_niches", {"archive": 4})(setting)
    assert isinstance(optimizer, NaturalNiches)
    generator = np.random.default_rng(0)

    def told(solved: list[int]) -> Vector:
        point = generator.random(8)
        values = np.isin(np.arange(10), solved).astype(float)
        scores = Scores(tuple(map(str, range(10))), {"m0": -values}, np.ones(10))
        optimizer.tell_result(point, Result(-values.mean(), (-values.mean(),), scores={"e": scores}))
        return point

    specialist = told([7, 8, 9])
    for _ in range(20):
        told([0, 1, 2, 3, int(generator.integers(4, 7))])
    assert any(np.array_equal(specialist, member.point) for member in optimizer.members)
    assert len(optimizer.members) == 4


def test_mutation_changes_kinds_as_they_are() -> None:
    setting = problem("mixed")
    mixing, generator = GeneMixing(setting), np.random.default_rng(0)
    changed = {"choice": 0, "bool": 0, "int": 0, "float": 0}
    for _ in range(400):
        moved = mixing.mutate(setting.start, 0.1, generator)
        assert ((moved >= 0) & (moved <= 1)).all()
        for gene, before, after in zip(setting.genes, setting.start, moved, strict=True):
            changed[gene.kind] += gene.value(before) != gene.value(after)
            if gene.kind in ("choice", "bool") and before != after:
                assert gene.value(before) != gene.value(after)  # another value altogether, never the same again
    assert changed["float"] == 400 * 8
    assert changed["choice"] + changed["bool"] == pytest.approx(400, rel=0.25)  # one of them a child
    assert np.array_equal(mixing.mutate(setting.start, 0.0, generator), setting.start)


def test_the_archives_of_map_elites_hold_what_those_of_pyribs_hold() -> None:
    from ribs.archives import GridArchive

    setting = problem(objectives=3)
    optimizer = optimizer_named("map_elites", {"cells": 7})(setting)
    assert isinstance(optimizer, MapElites)
    theirs = [GridArchive(solution_dim=8, dims=[7, 7], ranges=[(-1.0, 2.0)] * 2) for _ in range(3)]
    generator = np.random.default_rng(0)
    for _ in range(400):
        point, losses = generator.random(8), generator.uniform(-1.5, 2.5, 3)
        optimizer.tell_result(point, Result(float(losses.mean()), tuple(map(float, losses))))
        for term, archive in enumerate(theirs):
            archive.add_single(point, -losses[term], np.delete(losses, term))
    for term, archive in enumerate(theirs):
        found = {elite.point.tobytes() for elite in optimizer.archives[term].elites.values()}
        assert found == {np.ascontiguousarray(row).tobytes() for row in archive.data("solution")}


def test_elites_that_are_good_at_all_terms_are_parents_more_often() -> None:
    optimizer = optimizer_named("map_elites")(problem(objectives=2))
    assert isinstance(optimizer, MapElites)
    for losses in [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)]:
        optimizer.archives[0].add(optimizer.cell(Elite(np.zeros(8), losses, 0.0), 0), Elite(np.zeros(8), losses, 0.0))
    _, weights = optimizer.archives[0].choices()
    # The archive of the first term has a cell for each loss of the second: (1, 1) lost its cell to (0, 1).
    assert weights.tolist() == pytest.approx([0.8 * 0.8, 0.8 * 0.5])


def test_with_one_term_the_cells_are_the_means_of_the_two_halves_of_the_model() -> None:
    optimizer = optimizer_named("map_elites", {"cells": 10})(problem())
    assert isinstance(optimizer, MapElites)
    point = np.array([0.15] * 4 + [0.85] * 4)
    assert optimizer.cell(Elite(point, (0.0,), 0.0), 0) == (1, 8)

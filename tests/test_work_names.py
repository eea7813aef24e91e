"""Two candidates share an evaluation only if it is the same one: recipe, what is learned, and items."""

from __future__ import annotations

from itertools import combinations

import pytest
from unscored import Unscored

from search.candidate import work_name
from search.objective import Objective, Term
from search.racing.config import FitnessConfig
from search.racing.ladder import item_order
from search.racing.race import Race
from search.racing.rotation import Rotation

SEED = 5
COUNTS = {"e": 80, "f": 100, "few": 3}


@pytest.fixture(scope="module")
def races() -> list[Race]:
    """Of everything that a search on parts asks for: parents, baselines, their steps, and two turns of all parts."""
    evaluators = {name: Unscored(count) for name, count in COUNTS.items()}
    rotation = Rotation(FitnessConfig(rotate=True, first=0.1), evaluators, SEED, 2)
    objective = Objective((Term("e.loss", 1.0, 1),), (), needs_parents=False)
    turns = [rotation.race(objective, False) for _ in range(2 * rotation.parts)]
    generation_0 = [rotation.race(objective, False, "baseline"), rotation.race(objective, False, "step")]
    return [rotation.race(objective, True), *generation_0, *turns]


def items_of(race: Race) -> set[tuple[str, str]]:
    return {
        (name, item)
        for name, size in race.rungs[-1].items()
        for item in race.chosen(name, item_order(SEED, name, tuple(Unscored(COUNTS[name]).items("search"))))[:size]
    }


def test_a_recipe_has_one_name_on_the_same_items_and_another_on_others(races: list[Race]) -> None:
    assert len({work_name("r", None, race) for race in races}) > 10
    for one, other in combinations(races, 2):
        same = work_name("r", None, one) == work_name("r", None, other)
        assert same == (items_of(one) == items_of(other)), f"{one} and {other}"


def test_a_step_over_several_parts_is_not_the_last_of_them_alone(races: list[Race]) -> None:
    step, turns = races[2], races[3:]
    ends = [race for race in turns if items_of(race) <= items_of(step)]
    assert len(ends) > 2, "the step has the items of several parts"
    assert work_name("r", None, step) not in {work_name("r", None, race) for race in turns}


def test_on_all_items_it_has_the_name_that_it_has_without_a_race(races: list[Race]) -> None:
    assert work_name("r", None, races[0]) == work_name("r", None, None) == "r"
    assert work_name("r", None, Race(({"e": 8}, {"e": 80}))) == "r", "of nested subsets all candidates have the first"

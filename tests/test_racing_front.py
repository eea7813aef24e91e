"""A candidate is stopped when a member of the front is better in every term, and as rarely otherwise as promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from evaluators.base import Scores
from search.racing.front import FrontReference, Member
from search.racing.race import Race, Reference

ALPHA, TOTAL = 0.05, 200
SIZES = (20, 40, 80, 160, TOTAL)


def scores_of(values: np.ndarray) -> Scores:
    return Scores(tuple(f"i{k}" for k in range(len(values))), {"loss": values}, np.ones(len(values)))


def term(name: str, values: np.ndarray, low: float | None) -> Reference:
    total = len(values)
    low = low if total == TOTAL else None
    return Reference(0.0, {name: {"loss": 1.0}}, {name: values}, {name: 1.0}, total, {name: total}, low, 0.3, ALPHA)


def member(scores: Mapping[str, np.ndarray], low: float | None = None) -> Member:
    return Member(0.0, tuple(term(name, values, low) for name, values in scores.items()))


def is_stopped(own: Mapping[str, np.ndarray], members: Sequence[Member]) -> bool:
    rungs = tuple({name: min(size, len(values)) for name, values in own.items()} for size in SIZES)
    race = Race(rungs, FrontReference(tuple(members), ALPHA))
    seen = [{name: scores_of(own[name][:count]) for name, count in sizes.items()} for sizes in rungs]
    return any(race.stops(rung, scores) for rung, scores in enumerate(seen))


@pytest.mark.parametrize("low", [None, -1.0])
def test_a_candidate_that_is_as_good_in_one_term_is_rarely_stopped_however_bad_in_the_other(low: float | None) -> None:
    generator, runs, stopped = np.random.default_rng(0), 300, 0
    for _ in range(runs):
        draws = (generator.random((4, TOTAL)) < 0.4).astype(float)
        # Three members, each better in `b`, and as good in `a`: the same scores in another order.
        against = [
            member({"a": generator.permutation(draws[0]), "b": np.zeros(TOTAL)}, low),
            member({"a": generator.permutation(draws[0]), "b": draws[1] * draws[2]}, low),
            member({"a": generator.permutation(draws[0]), "b": draws[1] * draws[3]}, low),
        ]
        stopped += is_stopped({"a": draws[0], "b": np.ones(TOTAL)}, against)
    assert stopped / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


@pytest.mark.parametrize("low", [None, -1.0])
def test_a_candidate_that_one_of_several_members_dominates_is_stopped(low: float | None) -> None:
    generator, runs, stopped = np.random.default_rng(1), 60, 0
    for _ in range(runs):
        good, bad = ((generator.random((2, TOTAL)) < rate).astype(float) for rate in (0.2, 0.6))
        elsewhere = member({"a": np.ones(TOTAL), "b": np.zeros(TOTAL)}, low)
        dominating = member({"a": good[0], "b": good[1]}, low)
        stopped += is_stopped({"a": bad[0], "b": bad[1]}, [elsewhere, dominating])
    assert stopped > 0.9 * runs


@pytest.mark.parametrize(("layers", "stops"), [(3.0, False), (4.0, True), (5.0, True)])
def test_a_shorter_path_protects_and_an_equal_one_does_not(layers: float, stops: bool) -> None:
    generator = np.random.default_rng(2)
    values = generator.normal(size=TOTAL)
    against = member({"a": values, "layers": np.array([4.0])})
    worse = values + generator.normal(1.0, 0.2, TOTAL)
    assert is_stopped({"a": worse, "layers": np.array([layers])}, [against]) == stops


def test_a_candidate_that_equals_a_member_in_all_that_is_known_goes_on() -> None:
    against = member({"layers": np.array([4.0]), "size": np.array([7.0])})
    seen = {"layers": scores_of(np.array([4.0])), "size": scores_of(np.array([7.0]))}
    reference = FrontReference((against,), ALPHA)
    assert not reference.loses(seen)
    assert reference.loses({**seen, "size": scores_of(np.array([8.0]))})

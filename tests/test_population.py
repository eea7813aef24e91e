"""Generation 0 and the optimiser behind one ask and tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from landscape import BASELINES, loss_of, population

from search.candidate import Candidate
from search.population import Population


def loss(candidate: Candidate) -> float:
    return loss_of(candidate.recipe)


def drive(made: Population, budget: int, window: int, fail: Sequence[int] = ()) -> list[Candidate]:
    """Ordered commit with the window full, as the driver does it."""
    open_: list[Candidate] = []
    asked: list[Candidate] = []

    def fill() -> None:
        while len(open_) < window and len(asked) < budget:
            candidate = made.ask()
            if candidate is None:
                return
            open_.append(candidate)
            asked.append(candidate)

    fill()
    while open_:
        told = open_.pop(0)
        made.tell(told.id, None if told.id in fail else {"e.loss": loss(told)})
        fill()
    return asked


def test_generation_0_starts_with_the_parents_and_the_base_and_holds_every_baseline() -> None:
    asked = drive(population(), 60, 4)
    labels = [candidate.origin for candidate in asked if candidate.genome is None]
    assert labels[:4] == ["parent:a", "parent:b", "parent:c", "base"]
    families = {label.split(" ")[0].split("+")[0] for label in labels[4:]}
    assert families == set(BASELINES)
    assert [candidate.id for candidate in asked] == list(range(60))
    searched = [candidate for candidate in asked if candidate.genome is not None]
    assert min(c.id for c in searched) > max(c.id for c in asked if c.genome is None)


def test_the_greedy_soup_adds_the_best_parents_while_they_help() -> None:
    """By hand: a is best (loss 0.35), b next (0.75): the mean of both is closer; c (1.15) makes it worse."""
    asked = drive(population(), 60, 4)
    by_label = {candidate.origin: candidate for candidate in asked}
    assert loss(by_label["parent:a"]) < loss(by_label["parent:b"]) < loss(by_label["parent:c"])
    pair, triple = by_label["greedy_soup+a+b"], by_label["greedy_soup+a+b+c"]
    assert loss(pair) < loss(by_label["parent:a"])
    best = pair if loss(pair) < loss(triple) else triple
    assert by_label["greedy_soup"].recipe.hash == best.recipe.hash
    assert pair.step
    assert not by_label["greedy_soup"].step


def test_the_search_starts_at_the_best_of_generation_0_that_the_space_can_make() -> None:
    asked = drive(population(), 60, 4)
    first = next(candidate for candidate in asked if candidate.genome is not None)
    hinted = [
        c for c in asked if c.genome is None and c.recipe.rules[0].operator in ("linear", "task_arithmetic", "slerp")
    ]
    best = min(hinted, key=lambda c: (loss(c), c.id))
    assert loss(first) == pytest.approx(loss(best))


def test_the_search_improves_on_generation_0() -> None:
    asked = drive(population(budget=160), 160, 4)
    zero = min(loss(c) for c in asked if c.genome is None)
    assert min(loss(c) for c in asked if c.genome is not None) < 0.5 * zero


@pytest.mark.parametrize("normalize", ["none", "parents"])
def test_what_is_asked_depends_on_seed_and_window_only(normalize: str) -> None:
    first = drive(population(normalize=normalize), 50, 4)
    second = drive(population(normalize=normalize), 50, 4)
    assert [(c.origin, c.recipe.hash) for c in first] == [(c.origin, c.recipe.hash) for c in second]
    other_window = drive(population(normalize=normalize, window=8), 50, 8)
    assert [c.recipe.hash for c in other_window] != [c.recipe.hash for c in first]


@pytest.mark.parametrize("window", [1, 2, 4, 9, 40])
def test_every_window_reaches_the_budget(window: int) -> None:
    assert len(drive(population(window=window), 45, window)) == 45


def test_a_failed_parent_and_failed_candidates_do_not_stop_the_search() -> None:
    asked = drive(population(normalize="parents"), 60, 4, [1, 7, 40, 41])
    assert len(asked) == 60


def test_normalised_losses_are_known_from_the_moment_all_parents_are() -> None:
    made = population(normalize="parents")
    parents = [made.ask() for _ in range(3)]
    for index, parent in enumerate(parents):
        assert parent is not None
        assert made.judge({"e.loss": 1.0}) is None
        made.tell(parent.id, {"e.loss": 1.0 + index})
    judged = made.judge({"e.loss": 0.0})
    assert judged is not None
    assert judged.loss == pytest.approx(-0.5)


def test_parents_that_all_fail_are_noticed() -> None:
    made = population(normalize="parents")
    for _ in range(3):
        parent = made.ask()
        assert parent is not None
        made.tell(parent.id, None)
    assert made.parents_failed()

"""What a run evaluates: a recipe with an id and an origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from search.genome import Genome
from search.racing.race import Race
from search.recipe import Recipe
from search.soups.plan import LearnSoup

BASE_LABEL = "base"
PARENT = "parent:"
"""Before the name of a source: it alone, as a candidate."""
SEARCHED = "search"


@dataclass(frozen=True)
class Candidate:
    """A recipe with an id and an origin.

    Attributes:
        id: number in the run, from 0, in the order of asking.
        origin: label of generation 0 (`parent:x`, `uniform_soup`, ...), or `search`.
        recipe: the merge.
        genome: where it came from, for candidates of the optimiser.
        step: generation 0 only: an attempt inside a baseline, no result of its own.
        learn: what a worker shall learn from the recipe, beside scoring it.
        known_hash: `Recipe.hash` of the recipe, where it was found in a cheaper way.
        race: how far it is scored on the search items; None: on all of them.
    """

    id: int
    origin: str
    recipe: Recipe
    genome: Genome | None = None
    step: bool = False
    learn: LearnSoup | None = None
    known_hash: str | None = None
    race: Race | None = field(default=None, compare=False, repr=False)

    @property
    def is_parent(self) -> bool:
        """Whether it is one source alone, of generation 0."""
        return self.origin.startswith(PARENT)

    @cached_property
    def recipe_hash(self) -> str:
        """`Recipe.hash`, computed once."""
        return self.known_hash or self.recipe.hash

    @cached_property
    def work(self) -> str:
        """Equal for candidates whose evaluation is the same, so that one is enough."""
        return work_name(self.recipe_hash, self.learn, self.race)


def work_name(recipe_hash: str, learn: LearnSoup | None, race: Race | None) -> str:
    """See `Candidate.work`."""
    found = recipe_hash if learn is None else f"{recipe_hash} {learn}"
    return found if race is None or not race.begin else f"{found} items {race.chosen_items}"

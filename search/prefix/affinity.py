"""Which candidates begin alike, as the driver sees it: by their rules, without a model.

A hint for the pools, who send candidates to the worker that keeps states of theirs. Nothing that is recorded depends
on it; the worker goes by `search.prefix.contents`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from search.grouping import place_of
from search.recipe import Recipe, Rule

REMEMBERED = 1 << 12
"""Layers of candidates that are remembered of a worker."""


class Prefixes:
    """Chained numbers for the layers of recipes.

    Args:
        tensors: names of the tensors of a candidate.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._tensors = tuple(tensors)
        self._order: tuple[tuple[tuple[str, ...], ...], list[tuple[int, ...]]] = ((), [])

    def of(self, recipe: Recipe) -> tuple[int, ...]:
        """(n_layers + 1,) numbers: that at k is equal for two recipes that make all before layer k alike.

        Equal in one process only.
        """
        placebos = tuple((n, ref.random_delta) for n, ref in recipe.models.items() if ref.random_delta is not None)
        common = (recipe.base, recipe.seed, recipe.dtype, placebos)
        found: list[int] = []
        last = hash(common)
        if recipe.layers is not None:  # which layers run tells paths apart; their merges are mostly the same
            for layer, scale in zip(recipe.layers, recipe.scales or [1.0] * len(recipe.layers), strict=True):
                last = hash((last, *layer.items(), scale))
                found.append(last)
            return tuple(found)
        made_by = [_number(rule) for rule in recipe.rules]
        for rules in self._rules_by_layer(recipe):
            last = hash((last, *[made_by[rule] for rule in rules]))
            found.append(last)
        return tuple(found)

    def _rules_by_layer(self, recipe: Recipe) -> list[tuple[int, ...]]:
        """The numbers of the rules that make what is outside of the layers, then of every layer, tensor by tensor."""
        patterns = tuple(rule.tensors for rule in recipe.rules)
        if patterns != self._order[0]:
            number = {id(rule): index for index, rule in enumerate(recipe.rules)}
            parts: dict[tuple[int, str], list[int]] = {}
            for name, rule in recipe.assign(self._tensors).items():
                place = place_of(name)
                if place.layer is None and place.kind in ("norm", "head"):
                    continue  # after the layers, as a rule
                key = (-1, "") if place.layer is None else (place.layer, place.stack)
                parts.setdefault(key, []).append(number[id(rule)])
            self._order = patterns, [_runs(rules) for _, rules in sorted(parts.items())]
        return self._order[1]


class Recent:
    """What a worker has seen lately."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, None] = OrderedDict()

    def add(self, prefix: Sequence[int]) -> None:
        """A candidate went to the worker."""
        for number in prefix:
            self._seen[number] = None
            self._seen.move_to_end(number)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def shared(self, prefix: Sequence[int]) -> int:
        """How many numbers of a prefix, from its first, are among those seen."""
        for count, number in enumerate(prefix):
            if number not in self._seen:
                return count
        return len(prefix)


def _number(rule: Rule) -> int:
    sources = tuple([(name, *values.items()) for name, values in rule.sources.items()])
    return hash((rule.operator, sources, tuple(rule.parameters.items())))


def _runs(numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers without those that repeat the one before: tensors in their order, shorter."""
    return tuple([number for at, number in enumerate(numbers) if at == 0 or numbers[at - 1] != number])

"""Recipes of the common merges from model names and a few numbers, for the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from search.baseline import soup_rule, vectors_rule
from search.curves import slerp_rule, slerp_rules
from search.errors import RecipeError
from search.merge.check import check_recipe
from search.recipe import ModelRef, Recipe, Rule
from search.sources import check_models, open_models

BASE = "base"


class Shelf:
    """The models of a recipe in the making.

    Args:
        base: model that task vectors start from, called `base` in the recipe.
    """

    def __init__(self, base: str | None = None) -> None:
        self.base = None if base is None else BASE
        self._models: dict[str, ModelRef] = {}
        if base is not None:
            self._models[BASE] = ModelRef(path=_place(base))

    def add(self, model: str) -> str:
        """The name in the recipe of a folder or hub id, given alone or as `name=model`.

        Without a name it is the last part of the path; a second model of that name gets a number.
        """
        given, equals, path = model.partition("=")
        if not equals or "/" in given:
            given, path = "", model
        if not path:
            raise RecipeError(f"'{model}': no model after the '='; expected a folder, a hub id, or name=folder")
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", given or Path(path).expanduser().resolve().name).strip("-") or "model"
        if given and stem != given:
            raise RecipeError(f"'{given}': names are made of letters, digits, '-' and '_'")
        if given and given in self._models:
            raise RecipeError(f"two models are called '{given}'; give one of them another name before its '='")
        name, number = stem, 1
        while name in self._models:
            number += 1
            name = f"{stem}-{number}"
        self._models[name] = ModelRef(path=_place(path))
        return name

    def names(self) -> tuple[str, ...]:
        """The tensors of the output, from the headers of the first model."""
        return tuple(open_models(self._models, base=self.base)[next(iter(self._models))].tensors)

    def recipe(self, rules: Sequence[Rule]) -> Recipe:
        """The recipe, checked against its operators and the headers of its models.

        Raises:
            UserError: a model that is not there, or models and rules that do not fit.
        """
        recipe = Recipe(base=self.base, models=self._models, rules=tuple(rules))
        check_recipe(recipe)
        check_models(open_models(recipe.models, base=recipe.base), recipe)
        return recipe


def soup(models: Sequence[str], weights: Sequence[float] = ()) -> Recipe:
    """The mean of models, or with as many weights as models their weighted mean."""
    if weights and len(weights) != len(models):
        raise RecipeError(f"{len(weights)} weights for {len(models)} models; give one for each, or none for the mean")
    if weights and sum(weights) == 0:
        raise RecipeError("the weights add up to 0; their mean is not defined")
    shelf = Shelf()
    names = [shelf.add(model) for model in models]
    return shelf.recipe([soup_rule(dict(zip(names, weights or [1.0] * len(names), strict=True)))])


def add(base: str, models: Sequence[str], scale: float) -> Recipe:
    """base + scale * sum of the task vectors (Ilharco 2023); a negative scale takes away."""
    shelf = Shelf(base)
    return shelf.recipe([vectors_rule({shelf.add(model): scale for model in models})])


def analogy(a: str, b: str, c: str, scale: float, base: str | None = None) -> Recipe:
    """a is to b as c is to ?: c + scale * (b - a), or base + scale * (tau_c + tau_b - tau_a) with a base."""
    shelf = Shelf(base)
    name_a, name_b, name_c = (shelf.add(model) for model in (a, b, c))
    if base is not None:
        return shelf.recipe([vectors_rule({name_c: scale, name_b: scale, name_a: -scale})])
    weights: Mapping[str, float] = {name_c: 1.0, name_b: scale, name_a: -scale}
    return shelf.recipe([soup_rule(weights).model_copy(update={"parameters": {"normalize": False}})])


def slerp(first: str, second: str, t: float, curve: Sequence[float] = (), base: str | None = None) -> Recipe:
    """Spherical interpolation; with a base that of the task vectors.

    Args:
        t: 0: the first, 1: the second. With a curve that of tensors outside of the layers.
        curve: t over the layers, from the first to the last.
    """
    shelf = Shelf(base)
    names = shelf.add(first), shelf.add(second)
    task_vectors = base is not None
    if not curve:
        return shelf.recipe([slerp_rule(*names, t, task_vectors=task_vectors)])
    return shelf.recipe(slerp_rules(shelf.names(), *names, {"*": curve}, t, task_vectors=task_vectors))


def karcher(models: Sequence[str]) -> Recipe:
    """The Karcher mean of models: spherical, of any number, in no order."""
    shelf = Shelf()
    return shelf.recipe([Rule(operator="karcher", sources={shelf.add(model): {} for model in models})])


def _place(model: str) -> str:
    """A local folder as an absolute path, so that the recipe works from anywhere; hub ids as they are."""
    local = Path(model).expanduser()
    return str(local.resolve()) if local.exists() or model.startswith((".", "/", "~")) else model

"""Recipes from files, with faults reported by line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from search.errors import ConfigError, RecipeError
from search.recipe import Recipe
from search.yaml_source import YamlSource


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        ConfigError: every fault of form, with its line.
        RecipeError: a rule names a model that the recipe does not have.
    """
    source = YamlSource.read(path)
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError("\n".join(source.faults(error, Recipe))) from error
    try:
        recipe.check()
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe

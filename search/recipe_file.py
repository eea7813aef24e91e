"""Recipes from files, with faults reported by line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from search.errors import ConfigError, RecipeError
from search.merge.check import check_recipe
from search.mergekit.merge_file import is_merge_file
from search.recipe import Recipe
from search.yaml_source import YamlSource


def read_recipe(path: Path, report: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a YAML file: one of ours, or a merge file of mergekit, whose models are opened for it.

    Args:
        report: called with a line for everything in a merge file that has no effect.

    Raises:
        ConfigError: every fault of form, with its line.
        RecipeError: a rule that names a model which the recipe does not have, or that its operator cannot
            carry out.
    """
    if (path / "recipe.yaml").is_file():
        raise ConfigError(f"{path}: is a folder, expected a YAML file such as {path / 'recipe.yaml'}")
    source = YamlSource.read(path)
    if "evaluators" in source.data and "objectives" in source.data:
        raise ConfigError(f"{path}: is the config of a search, not a recipe; run it with: meiosis search {path}")
    if is_merge_file(source.data):
        from search.mergekit.reader import read_merge_file

        return read_merge_file(source, path.resolve().parent, report)
    if "genome" in source.data:
        raise ConfigError(f"{path}: is a search file of mergekit-evolve; `meiosis mergekit {path}` makes it a config")
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError("\n".join(source.faults(error, Recipe))) from error
    try:
        check_recipe(recipe)
    except RecipeError as error:
        where, _, message = str(error).partition(": ")
        keys = re.findall(r"[^.\[\]]+", where)
        location = tuple(int(key) if key.isdigit() else key for key in keys)
        raise RecipeError(source.fault(location, message)) from error
    return recipe

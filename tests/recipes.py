"""Recipes over the small family of `family`, one for every operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from family import DOMAINS

from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.recipe import ModelRef, Recipe

PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "task_arithmetic": ({"weight": 0.4}, {"lambda": 0.9}),
    "ties": ({"weight": 0.7, "density": 0.4}, {}),
    "dare_ties": ({"weight": 0.6, "density": 0.5}, {}),
    "dare_linear": ({"weight": 0.3, "density": 0.6}, {}),
    "linear": ({"weight": 0.4}, {}),
    "slerp": ({}, {"t": 0.3}),
}
"""Operator -> parameters of each source, and shared ones."""


def models_of(family: Path) -> dict[str, ModelRef]:
    """The family as a run refers to it, by content."""
    names = ("base", *DOMAINS)
    return {
        name: ModelRef(path=str(family / name), sha256=fingerprint(open_checkpoint(family / name)).sha256)
        for name in names
    }


def recipe_of(family: Path, operator: str, dtype: str | None = None, seed: int = 3, **changed: float) -> Recipe:
    """A merge of the whole family with one operator; `changed` replaces parameters of the sources."""
    per_source, shared = PARAMETERS[operator]
    sources = DOMAINS[:2] if operator == "slerp" else DOMAINS
    rule = {"operator": operator, "sources": {s: {**per_source, **changed} for s in sources}, "parameters": shared}
    models = {name: ref.model_dump() for name, ref in models_of(family).items()}
    return Recipe.from_data({"base": "base", "models": models, "rules": [rule], "dtype": dtype, "seed": seed})

"""Recipes over the small family of `family`, one for every operator that needs no statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from family import DOMAINS

from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.recipe import ModelRef, Recipe
from search.registry import OPERATORS

PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "task_arithmetic": ({"weight": 0.4}, {"lambda": 0.9}),
    "ties": ({"weight": 0.7, "density": 0.4}, {}),
    "dare_ties": ({"weight": 0.6, "density": 0.5}, {}),
    "dare_linear": ({"weight": 0.3, "density": 0.6}, {}),
    "linear": ({"weight": 0.4}, {}),
    "slerp": ({}, {"t": 0.3}),
    "nuslerp": ({"weight": 0.6}, {"nuslerp_flatten": False}),
    "multislerp": ({"weight": 0.4}, {"task_vectors": True}),
    "karcher": ({}, {}),
    "breadcrumbs": ({"weight": 0.5, "density": 0.6, "gamma": 0.1}, {}),
    "breadcrumbs_ties": ({"weight": 0.5, "density": 0.6, "gamma": 0.1}, {}),
    "della": ({"weight": 0.6, "density": 0.5}, {}),
    "della_linear": ({"weight": 0.3, "density": 0.5}, {}),
    "model_stock": ({}, {}),
    "nearswap": ({}, {"t": 0.01}),
    "passthrough": ({"scale": 0.9}, {}),
    "sce": ({}, {"select_topk": 0.5}),
    "arcee_fusion": ({}, {}),
    "ram": ({}, {}),
    "ramplus_tl": ({}, {}),
    "tsv_m": ({}, {}),
    "iso_c": ({}, {}),
    "iso_cts": ({}, {"common": 0.7}),
    "wudi": ({}, {}),
    "consensus": ({}, {}),
    "tall_mask": ({}, {"task": 1}),
    "lines": ({}, {}),
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
    sources = DOMAINS[: OPERATORS.get(operator).max_sources]
    rule = {"operator": operator, "sources": {s: {**per_source, **changed} for s in sources}, "parameters": shared}
    models = {name: ref.model_dump() for name, ref in models_of(family).items()}
    return Recipe.from_data({"base": "base", "models": models, "rules": [rule], "dtype": dtype, "seed": seed})

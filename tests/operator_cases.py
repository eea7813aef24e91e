"""Models, recipes and merges for tests of single operators, and how to read them in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)

Array = NDArray[np.float64]
WEIGHTS = st.floats(0.125, 2.0, width=32)
SHAPES = st.sampled_from([(), (1,), (7,), (1500,), (5, 1), (1, 6), (13, 40), (3, 4, 5)])
WITH_BASE = (
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "model_stock",
    "nearswap",
    "ram",
    "ramplus_tl",
    "sce",
)
FIXED_COUNT = {"arcee_fusion": 1, "nearswap": 1, "passthrough": 1, "nuslerp": 2}


def models_of(count: int, shape: tuple[int, ...], seed: int, step: float = 0.3) -> dict[str, Tensor]:
    """A base and `count` models near it, in float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return {
        "base": base,
        **{f"m{index}": base + step * torch.randn(shape, generator=generator) for index in range(count)},
    }


def recipe_of(
    operator: str,
    models: Mapping[str, Tensor],
    sources: Mapping[str, Mapping[str, Any]] | None,
    shared: Mapping[str, Any] | None,
    **more: Any,
) -> Recipe:
    """A merge of all models but the base, or of `sources`."""
    sources = sources or {name: {} for name in models if name != "base"}
    data = {
        "base": "base" if "base" in models else None,
        "models": {name: {"path": name} for name in models},
        "rules": [{"operator": operator, "sources": sources, "parameters": dict(shared or {})}],
        **more,
    }
    return Recipe.from_data(data)


def merge(
    operator: str,
    models: Mapping[str, Tensor],
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    engine = Merger({name: InMemoryTensors({"w": values}) for name, values in models.items()})
    return dict(engine.merge_tensors(recipe_of(operator, models, sources, shared, **more)))["w"]


def weighted(*weights: float, **others: Any) -> dict[str, dict[str, Any]]:
    return {f"m{index}": {"weight": weight, **others} for index, weight in enumerate(weights)}


def unpack(models: Mapping[str, Tensor]) -> tuple[Array, list[Array]]:
    """The base, and the differences from it as float32 has them."""
    base = models["base"]
    deltas = [np.asarray((values - base).double()) for name, values in models.items() if name != "base"]
    return np.asarray(base.double()), deltas


def doubles(models: Mapping[str, Tensor]) -> list[Array]:
    return [np.asarray(values.double()) for name, values in models.items() if name != "base"]


def close(found: Tensor, wanted: Array, size: float = 1.0) -> None:
    np.testing.assert_allclose(np.asarray(found.double()), wanted, rtol=3e-6, atol=4e-6 * size)

"""Tasks and merges of one tensor, for tests of operators with a closed form."""

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
from search.registry import OPERATORS

torch.set_num_threads(1)

Array = NDArray[np.float64]
DECOMPOSING = ("tsv_m", "iso_c", "iso_cts", "wudi")
MERGING = (*DECOMPOSING, "consensus", "tall_mask", "lines")
SHAPES = st.sampled_from([(6, 6), (9, 4), (4, 9), (12, 7), (7, 5)])


def recipe_of(operator: str, count: int, shared: Mapping[str, Any], per_source: list[dict[str, Any]] | None) -> Recipe:
    given_ = per_source or [{}] * count
    kind = OPERATORS.get(operator).statistics
    return Recipe.from_data(
        {
            "base": "base",
            "models": {
                "base": {"path": "base"},
                **{f"m{i}": {"path": f"m{i}", "statistics": kind and "file"} for i in range(count)},
            },
            "rules": [
                {
                    "operator": operator,
                    "sources": {f"m{i}": given_[i] for i in range(count)},
                    "parameters": dict(shared),
                }
            ],
        }
    )


def merged(
    operator: str,
    deltas: list[Tensor],
    *,
    name: str = "w",
    base: Tensor | None = None,
    per_source: list[dict[str, Any]] | None = None,
    statistics: list[dict[str, Tensor]] | None = None,
    **shared: Any,
) -> Tensor:
    """The merged task vector of one tensor in float64 (the merge, for operators without a base)."""
    base = torch.zeros_like(deltas[0]) if base is None else base
    models = {"base": base, **{f"m{i}": base + delta for i, delta in enumerate(deltas)}}
    engine = Merger(
        {model: InMemoryTensors({name: value.double()}) for model, value in models.items()},
        statistics={f"m{i}": InMemoryTensors(tensors) for i, tensors in enumerate(statistics or [])},
    )
    return dict(engine.merge_tensors(recipe_of(operator, len(deltas), shared, per_source)))[name] - base.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tasks_of(count: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [normal(*shape, seed=1000 * seed + i) for i in range(count)]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def close(found: Tensor, wanted: Array | Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), np.asarray(wanted), rtol=1e-9, atol=1e-10)


def polar(matrix: Array) -> Array:
    """M (M^T M)^(-1/2) by eigenvalues; for matrices with independent columns."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T

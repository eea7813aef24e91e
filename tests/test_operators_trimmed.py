"""Breadcrumbs and DELLA keep the elements that their definitions say: against NumPy in float64, without blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    SHAPES,
    Array,
    close,
    doubles,
    merge,
    models_of,
    unpack,
    weighted,
)
from torch import Tensor

from search.errors import RecipeError
from search.merge.della_masks import probabilities

torch.set_num_threads(1)


# Breadcrumbs


def breadcrumbs(delta: Array, density: float, gamma: float) -> Array:
    size = delta.size
    keep, top = int(density * size), int(gamma * size)
    low = max(0, size - keep - top)
    order = np.argsort(np.abs(delta.ravel()), kind="stable")[low : low + keep]
    kept = np.zeros(size)
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    density=st.floats(0.0, 1.0),
    gamma=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    coarse=st.booleans(),
    seed=st.integers(0, 9),
)
def test_breadcrumbs_keeps_the_middle_magnitudes(
    shape: tuple[int, ...], density: float, gamma: float, coarse: bool, seed: int
) -> None:
    models = models_of(2, shape, seed)
    if coarse:  # few distinct magnitudes
        models = {name: (values * 2).round() / 2 for name, values in models.items()}
    base, deltas = unpack(models)
    terms = [w * breadcrumbs(delta, density, gamma) for w, delta in zip((0.5, 0.25), deltas, strict=True)]
    sources = weighted(0.5, 0.25, density=density, gamma=gamma)
    close(merge("breadcrumbs", models, sources), base + sum(terms))
    sign = np.where(sum(terms) >= 0, 1.0, -1.0)
    elected = sum(np.where(np.sign(term) == sign, term, 0.0) for term in terms)
    close(merge("breadcrumbs_ties", models, sources), base + elected)


def test_breadcrumbs_of_a_large_tensor_finds_its_ranks_among_equal_magnitudes() -> None:
    models = models_of(1, (300, 301), seed=10)
    models = {name: (values * 8).round() / 8 for name, values in models.items()}
    base, (delta,) = unpack(models)
    for density, gamma in ((0.3, 0.05), (0.5, 0.0), (0.95, 0.1)):
        found = merge("breadcrumbs", models, weighted(1.0, density=density, gamma=gamma))
        close(found, base + breadcrumbs(delta, density, gamma))


def test_breadcrumbs_with_gamma_0_keeps_the_largest_and_rescales_to_the_l1_norm() -> None:
    models = models_of(1, (500,), seed=11)
    base, (delta,) = unpack(models)
    found = merge("breadcrumbs", models, weighted(1.0, density=0.5, gamma=0.0), {"rescale": True})
    change = np.asarray(found.double()) - base
    assert np.count_nonzero(change) == 250
    assert np.abs(change).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
    assert set(np.flatnonzero(change)) == set(np.argsort(-np.abs(delta))[:250])


# DELLA


def della(models: Mapping[str, Tensor], density: float, epsilon: float, seed: int = 0, **shared: Any) -> Tensor:
    sources = {name: {"weight": 1.0, "density": density, "epsilon": epsilon} for name in models if name != "base"}
    return merge("della_linear", models, sources, {"rescale": False, **shared}, seed=seed)


def test_della_keeps_an_element_with_the_probability_of_its_rank_in_the_row() -> None:
    columns, rows = 20, 6000
    generator = torch.Generator().manual_seed(12)
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)])
    base = torch.zeros(rows, columns)
    kept = della({"base": base, "m0": (order + 1.0)}, 0.5, 0.3) != 0
    for rank in range(columns):
        wanted = 0.5 - 0.3 + 2 * 0.3 * rank / (columns - 1)
        share = float(kept[order == rank].float().mean())
        assert abs(share - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / rows), rank


def test_della_probabilities_lie_around_the_density_in_even_steps() -> None:
    np.testing.assert_allclose(probabilities(3, 0.6, 0.1), [0.5, 0.6, 0.7])
    assert probabilities(1, 0.6, 0.1).tolist() == [0.6]


def test_della_masks_depend_on_seed_and_model_and_are_nested_over_densities() -> None:
    models = models_of(1, (64, 65), seed=13)
    kept = [della(models, density, 0.1) != models["base"] for density in (0.2, 0.4, 0.8)]
    for few, many in itertools.pairwise(kept):
        assert bool((few <= many).all())
        assert int(few.sum()) < int(many.sum())
    assert torch.equal(della(models, 0.4, 0.1), della(models, 0.4, 0.1))
    assert not torch.equal(della(models, 0.4, 0.1), della(models, 0.4, 0.1, seed=1))
    renamed = {"base": models["base"], "other": models["m0"]}
    assert not torch.equal(della(models, 0.4, 0.1), della(renamed, 0.4, 0.1))


def test_della_rescales_to_the_l1_norm_it_had() -> None:
    models = models_of(1, (64, 65), seed=14)
    _, (delta,) = unpack(models)
    change = np.asarray((della(models, 0.4, 0.1, rescale=True) - models["base"]).double())
    assert np.count_nonzero(change) < 0.45 * delta.size
    assert np.abs(change).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)


def test_della_is_task_arithmetic_with_its_masks_or_ties_with_them() -> None:
    models = models_of(3, (40, 41), seed=15)
    base, _ = unpack(models)
    weights = (0.5, 0.25, 1.0)
    sources = weighted(*weights, density=0.5, epsilon=0.2)
    alone = []
    for weight, name in zip(weights, ("m0", "m1", "m2"), strict=True):
        masked = della({"base": models["base"], name: models[name]}, 0.5, 0.2, rescale=True)
        alone.append(weight * (np.asarray(masked.double()) - base))
    linear = merge("della_linear", models, sources, {"normalize": True, "lambda": 2.0})
    close(linear, base + 2.0 * sum(alone) / sum(weights), size=5.0)
    sign = np.where(sum(alone) >= 0, 1.0, -1.0)
    agree = [(np.sign(term) == sign) & (term != 0) for term in alone]
    share = sum(weight * kept for weight, kept in zip(weights, agree, strict=True))
    elected = sum(term * kept for term, kept in zip(alone, agree, strict=True)) / np.where(share == 0, 1.0, share)
    close(merge("della", models, sources), base + elected, size=5.0)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (50, 1), (1, 50), (2, 30, 5), (0, 4)])
def test_della_is_defined_for_rows_of_one_element_and_for_constant_rows(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape)
    found = della({"base": base, "m0": base + 0.5}, 0.5, 0.2)
    assert found.shape == shape
    assert bool(((found == 0.0) | (found == 0.5)).all())


def test_della_ranks_along_the_second_axis() -> None:
    base = torch.zeros(400, 2, 9)
    step = torch.ones(400, 2, 9)
    step[:, 1] = 2.0
    kept = della({"base": base, "m0": step}, 0.5, 0.4) != 0
    shares = kept.float().mean((0, 2))
    assert abs(float(shares[0]) - 0.1) < 0.03
    assert abs(float(shares[1]) - 0.9) < 0.03


@pytest.mark.parametrize("operator", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.0, 0.0), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_of_0_and_1(operator: str, density: float, epsilon: float) -> None:
    sources = weighted(1.0, density=density, epsilon=epsilon)
    with pytest.raises(RecipeError, match=rf"operator '{operator}': density .* of 'm0' .* smaller epsilon") as caught:
        merge(operator, models_of(1, (5,), seed=16), sources)
    assert "\n" not in str(caught.value)


def test_della_of_density_1_keeps_everything_whatever_epsilon() -> None:
    models = models_of(1, (33,), seed=17)
    close(merge("della", models, weighted(1.0)), doubles(models)[0])

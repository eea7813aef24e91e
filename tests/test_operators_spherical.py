"""The spherical operators compute what their definitions say: against NumPy in float64, without blocks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    SHAPES,
    WEIGHTS,
    Array,
    close,
    doubles,
    merge,
    models_of,
    unpack,
    weighted,
)

from search.errors import RecipeError

torch.set_num_threads(1)


# Spherical methods


def slerp(first: Array, second: Array, t: float) -> Array:
    norms = [max(float(np.linalg.norm(v)), 1e-7) for v in (first, second)]
    cosine = float(np.clip((first / norms[0] * (second / norms[1])).sum(), -1, 1))
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, weights=st.tuples(WEIGHTS, WEIGHTS), task=st.booleans(), seed=st.integers(0, 9))
def test_nuslerp_interpolates_on_the_arc_between_whole_tensors(
    shape: tuple[int, ...], weights: tuple[float, float], task: bool, seed: int
) -> None:
    models = models_of(2, shape, seed)
    base, deltas = unpack(models)
    t = weights[1] / sum(weights)
    if task:
        wanted = base + slerp(deltas[0].ravel(), deltas[1].ravel(), t).reshape(shape)
    else:
        first, second = (values.ravel() for values in doubles(models))
        wanted = slerp(first, second, t).reshape(shape)
    close(merge("nuslerp", models, weighted(*weights), {"task_vectors": task}), wanted, size=20.0)


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("task", [False, True])
def test_nuslerp_unflattened_takes_vectors_along_the_last_or_the_first_axis(row_wise: bool, task: bool) -> None:
    models = models_of(2, (13, 40), seed=1)
    base, deltas = unpack(models)
    pair = deltas if task else doubles(models)
    axis = 0 if row_wise else 1
    wanted = np.empty_like(base)
    for at in range(base.shape[1 - axis]):
        place = (slice(None), at) if row_wise else (at, slice(None))
        wanted[place] = slerp(pair[0][place], pair[1][place], 0.25) + (base[place] if task else 0.0)
    shared = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise, "task_vectors": task}
    close(merge("nuslerp", models, weighted(0.75, 0.25), shared), wanted)


def test_nuslerp_gives_the_parents_back_at_its_ends_and_the_middle_for_weights_that_cancel() -> None:
    models = models_of(2, (200,), seed=2)
    for flatten in (True, False):
        shared = {"nuslerp_flatten": flatten}
        close(merge("nuslerp", models, weighted(1.0, 0.0), shared), doubles(models)[0])
        close(merge("nuslerp", models, weighted(0.0, 2.0), shared), doubles(models)[1])
        cancel, middle = (merge("nuslerp", models, weighted(*pair), shared) for pair in ((1.0, -1.0), (1.0, 1.0)))
        assert torch.equal(cancel, middle)


def test_nuslerp_blends_colinear_and_antipodal_tensors_linearly() -> None:
    first = torch.randn(300, generator=torch.Generator().manual_seed(3))
    for factor, flatten in itertools.product((1.0, 2.0, -1.0), (True, False)):
        models = {"m0": first, "m1": factor * first}
        found = merge("nuslerp", models, weighted(0.75, 0.25), {"nuslerp_flatten": flatten})
        close(found, np.asarray(((0.75 + 0.25 * factor) * first).double()))


@settings(max_examples=30, deadline=None)
@given(
    shape=SHAPES,
    weights=st.lists(WEIGHTS, min_size=2, max_size=4),
    task=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 9),
)
def test_multislerp_has_the_mean_direction_and_the_mean_norm(
    shape: tuple[int, ...], weights: list[float], task: bool, normalize: bool, seed: int
) -> None:
    models = models_of(len(weights), shape, seed)
    models = {**models, "m1": models["m1"] + 0.5}  # never opposite to another in a tensor of one element
    base, deltas = unpack(models)
    vectors = deltas if task else doubles(models)
    share = np.array(weights) / (sum(weights) if normalize else 1.0)
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    mean = sum(w * v / (n + 1e-8) for w, v, n in zip(share, vectors, norms, strict=True))
    if np.linalg.norm(mean) < 1e-3:
        return  # close to cancelling: the direction is that of rounding
    wanted = mean / np.linalg.norm(mean) * float((share * norms).sum()) + (base if task else 0.0)
    shared = {"task_vectors": task, "normalize_weights": normalize}
    close(merge("multislerp", models, weighted(*weights), shared), wanted, size=10.0)


def test_multislerp_blends_two_opposite_tensors_linearly_and_refuses_more() -> None:
    first = torch.randn(50, generator=torch.Generator().manual_seed(4))
    models = {"m0": first, "m1": -2.0 * first}
    close(merge("multislerp", models, weighted(0.5, 0.5)), np.asarray((-0.5 * first).double()))
    with pytest.raises(RecipeError, match=r"multislerp.*tensor 'w'.*m0, m1, m2 cancel.*change a weight"):
        merge("multislerp", {**models, "m2": torch.zeros(50)}, weighted(0.5, 0.5, 1.0))


def test_multislerp_refuses_weights_that_sum_to_nothing() -> None:
    models = models_of(3, (9,), seed=5)
    for weights in ((0.0, 0.0, 0.0), (1.0, -0.5, -0.5)):
        with pytest.raises(RecipeError, match=r"^rules\[0\]: operator 'multislerp': .* sum to 0.*change one"):
            merge("multislerp", models, weighted(*weights))
    merge("multislerp", models, weighted(1.0, -0.5, 0.25), {"normalize_weights": False})


def test_multislerp_gives_one_source_back_and_leaves_untouched_tensors_alone() -> None:
    models = models_of(1, (30,), seed=6)
    assert torch.equal(merge("multislerp", models, weighted(0.3), {"task_vectors": True}), models["m0"])
    same = dict.fromkeys(("base", "m0", "m1", "m2"), models["base"])
    found = merge("multislerp", same, weighted(0.2, 0.3, 0.5), {"task_vectors": True})
    assert torch.equal(found, models["base"])


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 5), seed=st.integers(0, 99))
def test_karcher_ends_where_the_angles_balance(count: int, seed: int) -> None:
    models = models_of(count, (60,), seed, step=0.8)
    vectors = doubles(models)
    norms = [np.linalg.norm(vector) for vector in vectors]
    found = np.asarray(merge("karcher", models, shared={"max_iter": 200, "tol": 1e-9}).double())
    assert np.linalg.norm(found) == pytest.approx(np.mean(norms), rel=1e-6)
    mean = found / np.linalg.norm(found)
    pull = np.zeros_like(mean)
    for vector, norm in zip(vectors, norms, strict=True):
        cosine = float(vector @ mean) / norm
        pull += math.acos(cosine) / math.sqrt(1 - cosine**2) * (vector / norm - cosine * mean)
    assert np.linalg.norm(pull) < 1e-5


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    models = models_of(2, (80,), seed=7)
    first, second = doubles(models)
    norms = [np.linalg.norm(first), np.linalg.norm(second)]
    wanted = slerp(first / norms[0], second / norms[1], 0.5) * np.mean(norms)
    close(merge("karcher", models), wanted)


def test_karcher_drops_zero_tensors_from_the_direction_but_not_from_the_norm() -> None:
    first = torch.randn(40, generator=torch.Generator().manual_seed(8))
    close(merge("karcher", {"m0": first, "m1": torch.zeros(40)}), np.asarray(first.double()) / 2)
    assert not merge("karcher", {"m0": torch.zeros(40), "m1": torch.zeros(40)}).any()
    assert torch.equal(merge("karcher", {"m0": first}), first)


def test_karcher_of_opposite_tensors_keeps_the_direction_of_the_first() -> None:
    first = torch.randn(40, generator=torch.Generator().manual_seed(9))
    close(merge("karcher", {"m0": first, "m1": -3.0 * first}), 2 * np.asarray(first.double()))

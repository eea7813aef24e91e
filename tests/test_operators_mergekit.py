"""The operators known from mergekit compute what their definitions say: against NumPy in float64, without blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from search.errors import RecipeError
from search.merge.apply import Merger
from search.merge.della_masks import probabilities
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


# Model Stock, NearSwap, passthrough


def model_stock(base: Array, vectors: list[Array]) -> Array:
    deltas = [vector - base for vector in vectors]
    pairs = [
        float(np.clip((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6), -1, 1))
        for a, b in itertools.combinations(deltas, 2)
    ]
    count, cosine = len(vectors), float(np.mean(pairs))
    denominator = 1 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    return t * np.mean(vectors, 0) + (1 - t) * base


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_moves_the_mean_towards_the_base_by_the_cosines(count: int, filter_wise: bool) -> None:
    common = torch.randn(13, 40, generator=torch.Generator().manual_seed(18))
    models = {n: v if n == "base" else v + 0.5 * common for n, v in models_of(count, (13, 40), seed=19).items()}
    base, vectors = np.asarray(models["base"].double()), doubles(models)
    if filter_wise:
        wanted = np.stack([model_stock(base[row], [v[row] for v in vectors]) for row in range(13)])
    else:
        wanted = model_stock(base, vectors)
    close(merge("model_stock", models, shared={"filter_wise": filter_wise}), wanted, size=2.0)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_opposite_task_vectors_is_the_base(filter_wise: bool) -> None:
    base, step = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(20)).round()
    models = {"base": base, "m0": base + step, "m1": base - step}
    assert torch.equal(merge("model_stock", models, shared={"filter_wise": filter_wise}), base)


def test_model_stock_needs_two_models() -> None:
    with pytest.raises(RecipeError, match="takes at least 2, found 1"):
        merge("model_stock", models_of(1, (5,), seed=21))


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, t=st.floats(0.0, 1.0), seed=st.integers(0, 9))
def test_nearswap_takes_over_what_is_nearer_than_t(shape: tuple[int, ...], t: float, seed: int) -> None:
    models = models_of(1, shape, seed)
    base, (delta,) = unpack(models)
    share = np.clip(t / np.maximum(np.abs(delta), 1e-6), 0, 1)
    close(merge("nearswap", models, shared={"t": t}), share * doubles(models)[0] + (1 - share) * base)
    if t == 0.0:
        assert torch.equal(merge("nearswap", models, shared={"t": t}), models["base"])


def test_passthrough_copies_and_scales() -> None:
    values = torch.tensor([1.5, -0.0, 3e-42, float("inf")])
    found = merge("passthrough", {"m0": values})
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))
    assert torch.equal(merge("passthrough", {"m0": values}, {"m0": {"scale": 0.5}}), values * 0.5)
    with pytest.raises(RecipeError, match="takes exactly 1, found 2"):
        merge("passthrough", {"m0": values, "m1": values})


# SCE, RAM, Arcee Fusion


def sce(base: Array, deltas: list[Array], topk: float) -> Array:
    stack = np.stack(deltas)
    if topk < 1:
        variance = stack.var(0).ravel()
        count = int(topk * np.count_nonzero(variance))
        mask = np.zeros(variance.size)
        mask[np.argsort(variance, kind="stable")[variance.size - count :]] = 1
        stack = stack * mask.reshape(base.shape)
    agree = np.sign(stack) == np.where(stack.sum(0) >= 0, 1.0, -1.0)
    energy = (stack**2).reshape(len(deltas), -1).mean(1)
    share = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(deltas), 1 / len(deltas))
    weights = share.reshape(-1, *[1] * base.ndim) * agree
    return base + (weights * stack).sum(0) / np.maximum(weights.sum(0), 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    shape=SHAPES,
    topk=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
    count=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_sce_selects_weights_and_erases(shape: tuple[int, ...], topk: float, count: int, seed: int) -> None:
    models = {name: values.double() for name, values in models_of(count, shape, seed).items()}
    base, deltas = unpack(models)
    close(merge("sce", models, shared={"select_topk": topk}), sce(base, deltas, topk))


def test_sce_of_a_large_tensor_selects_as_many_as_it_says() -> None:
    models = models_of(3, (300, 301), seed=22)
    changed = merge("sce", models, shared={"select_topk": 0.25}) != models["base"]
    deltas = torch.stack([models[name] - models["base"] for name in ("m0", "m1", "m2")])
    variance = deltas.var(0, correction=0)
    count = int(0.25 * int((variance != 0).sum()))
    assert int(changed.sum()) == count
    assert float(variance[changed].min()) >= float(variance[~changed].max())


def ram(base: Array, deltas: list[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    active = np.abs(np.stack(deltas)) > np.float32(epsilon)
    count = active.sum(0)
    result = base.copy()
    for delta, kept in zip(deltas, active, strict=True):
        alone, together = (kept & (count == 1)).sum(), (kept & (count > 1)).sum()
        growth = 1 + r * min(together / max(alone, epsilon), alpha)
        result += delta * kept * np.where(count == 1, growth, 1 / np.maximum(count, 1))
    return result


@settings(max_examples=30, deadline=None)
@given(
    shape=SHAPES,
    epsilon=st.sampled_from([1e-5, 0.2, 0.5]),
    r=st.floats(0.0, 1.0),
    alpha=st.floats(0.0, 3.0),
    count=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_ram_averages_shared_changes_and_ramplus_amplifies_the_others(
    shape: tuple[int, ...], epsilon: float, r: float, alpha: float, count: int, seed: int
) -> None:
    models = models_of(count, shape, seed)
    base, deltas = unpack(models)
    close(merge("ram", models, shared={"epsilon": epsilon}), ram(base, deltas, epsilon))
    shared = {"epsilon": epsilon, "r": r, "alpha": alpha}
    close(merge("ramplus_tl", models, shared=shared), ram(base, deltas, epsilon, r, alpha), size=2.0)


def arcee_fusion(base: Array, source: Array) -> tuple[Array, Array]:
    """The merge, and how far the importance of each element is above the threshold."""

    def softmax(values: Array) -> Array:
        powers = np.exp(values - values.max(-1, keepdims=True))
        found: Array = powers / powers.sum(-1, keepdims=True) + 1e-8
        return found

    p, q = softmax(source), softmax(base)
    importance = np.abs(source - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(quarter * (ordered.size - 1))] for quarter in (0.25, 0.5, 0.75))
    above = importance - (median + 1.5 * (third - first))
    return np.where(above >= 0, source, base), above / np.abs(importance).max()


@pytest.mark.parametrize(("shape", "double"), [((7,), True), ((1500,), True), ((13, 40), True), ((300, 301), False)])
def test_arcee_fusion_takes_over_the_important_elements(shape: tuple[int, ...], double: bool) -> None:
    models = models_of(1, shape, seed=23)
    if double:
        models = {name: values.double() for name, values in models.items()}
    base, source = np.asarray(models["base"].double()), doubles(models)[0]
    wanted, above = arcee_fusion(base, source)
    found = np.asarray(merge("arcee_fusion", models).double())
    clear = np.abs(above) > 1e-4  # rounding decides about the others
    assert clear.mean() > 0.99 or base.size < 100
    np.testing.assert_allclose(found[clear], wanted[clear], rtol=1e-6)


def test_arcee_fusion_takes_exact_quartiles_of_large_tensors() -> None:
    models = models_of(1, (1100, 1000), seed=24)
    kept = merge("arcee_fusion", models) != models["base"]
    _, above = arcee_fusion(np.asarray(models["base"].double()), doubles(models)[0])
    clear = np.abs(above) > 1e-4
    assert np.array_equal(np.asarray(kept)[clear], (above > 0)[clear])


# All of them


def parameters_of(operator: str) -> tuple[dict[str, Any], dict[str, Any]]:
    own: dict[str, Any] = {"weight": 0.5}
    if operator in ("passthrough", "karcher", "model_stock", "nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion"):
        own = {}
    elif operator.startswith("della"):
        own |= {"density": 0.5, "epsilon": 0.2}
    elif operator.startswith("breadcrumbs"):
        own |= {"density": 0.6, "gamma": 0.1}
    return own, {"nearswap": {"t": 0.1}, "sce": {"select_topk": 0.5}}.get(operator, {})


DEGENERATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": lambda base, step: torch.zeros_like(base),
    "the base": lambda base, step: base,
    "opposite": lambda base, step: -base,
    "twice": lambda base, step: 2.0 * base,
    "moved": lambda base, step: base + step,
    "moved back": lambda base, step: base - step,
    "constant": lambda base, step: torch.ones_like(base),
    "tiny": lambda base, step: base + 1e-30 * step,
    "large": lambda base, step: 1e6 * step,
}
ALL = (*WITH_BASE, "karcher", "multislerp", "nuslerp", "passthrough")


@pytest.mark.parametrize("compute", ["float32", "inputs"])
@pytest.mark.parametrize("operator", ALL)
@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(sorted(DEGENERATE)), min_size=3, max_size=3),
    shape=SHAPES,
    zero_base=st.booleans(),
    extra=st.booleans(),
    narrow=st.booleans(),
)
def test_finite_models_give_finite_results_or_one_line_that_names_the_tensor(
    operator: str, compute: str, kinds: list[str], shape: tuple[int, ...], zero_base: bool, extra: bool, narrow: bool
) -> None:
    base, step = torch.randn(2, *shape, generator=torch.Generator().manual_seed(25))
    if zero_base:
        base = torch.zeros(shape)
    if compute == "inputs" and narrow:
        base, step = base.bfloat16(), step.bfloat16()
    own, shared = parameters_of(operator)
    if extra:
        shared = {
            **shared,
            **{"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}.get(operator, {}),
        }
        if operator in ("nuslerp", "multislerp"):
            shared["task_vectors"] = True
    models = {f"m{i}": DEGENERATE[kind](base, step) for i, kind in enumerate(kinds[: FIXED_COUNT.get(operator, 3)])}
    refusal = ""
    try:
        found = merge(operator, {"base": base, **models}, dict.fromkeys(models, own), shared, compute=compute)
    except RecipeError as error:
        refusal, found = str(error), base
    assert found.shape == shape
    assert bool(found.isfinite().all())
    # The only one without an answer to all of these.
    assert not refusal or (operator == "multislerp" and "'multislerp' at tensor 'w'" in refusal)
    assert "\n" not in refusal


@pytest.mark.parametrize("shape", [(400, 301), (70000,), (1, 70000), (70000, 1)])
@pytest.mark.parametrize(
    ("operator", "shared"),
    [
        ("nuslerp", {"nuslerp_flatten": False, "task_vectors": True}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("multislerp", {"task_vectors": True}),
        ("model_stock", {"filter_wise": True}),
        ("sce", {"select_topk": 0.3}),
        ("arcee_fusion", {}),
        ("breadcrumbs", {"rescale": True}),
        ("della", {}),
    ],
)
def test_bits_depend_neither_on_threads_nor_on_blocks_nor_on_what_is_prepared(
    operator: str, shared: dict[str, Any], shape: tuple[int, ...]
) -> None:
    models = models_of(FIXED_COUNT.get(operator, 2), shape, seed=29)
    own, _ = parameters_of(operator)
    sources = {name: own for name in models if name != "base"}
    recipe = recipe_of(operator, models, sources, shared)
    wanted = merge(operator, models, sources, shared)
    torch.set_num_threads(2)
    try:
        for options in ({"block_elements": 1024}, {"keep_prepared": False}):
            engine = Merger({name: InMemoryTensors({"w": values}) for name, values in models.items()}, **options)
            assert torch.equal(dict(engine.merge_tensors(recipe))["w"], wanted)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("operator", ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce"])
def test_what_has_no_effect_is_accepted(operator: str) -> None:
    models = models_of(2, (50,), seed=26)
    own, shared = parameters_of(operator)
    results = [
        merge(operator, models, {"m0": own, "m1": own}, {**shared, **extra}) for extra in ({}, {"int8_mask": True})
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("operator", WITH_BASE)
def test_operators_on_task_vectors_ask_for_a_base(operator: str) -> None:
    own, shared = parameters_of(operator)
    models = {name: v for name, v in models_of(2, (5,), seed=27).items() if name != "base"}
    models = dict(itertools.islice(models.items(), FIXED_COUNT.get(operator, 2)))
    with pytest.raises(RecipeError, match=f"operator '{operator}' takes differences from a base"):
        merge(operator, models, dict.fromkeys(models, own), shared)


@pytest.mark.parametrize("operator", ["nuslerp", "multislerp"])
def test_spherical_operators_ask_for_a_base_for_task_vectors_alone(operator: str) -> None:
    models = {name: v for name, v in models_of(2, (5,), seed=28).items() if name != "base"}
    merge(operator, models, weighted(0.5, 0.5))
    with pytest.raises(RecipeError, match=f"operator '{operator}' takes differences from a base"):
        merge(operator, models, weighted(0.5, 0.5), {"task_vectors": True})

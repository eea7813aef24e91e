"""The other operators known from mergekit compute what their definitions say, and all of them hold at the edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    FIXED_COUNT,
    SHAPES,
    WITH_BASE,
    Array,
    close,
    doubles,
    merge,
    models_of,
    recipe_of,
    unpack,
    weighted,
)
from torch import Tensor

from search.errors import RecipeError
from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors

torch.set_num_threads(1)


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

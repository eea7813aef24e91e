"""The operators compute what their papers say: against references in NumPy, in float64, without blocks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from search.merge.apply import Merger
from search.merge.count_table import MagnitudeTrim, find_thresholds, prepare_thresholds
from search.merge.inputs import RecentValues, Scratch, TensorInputs
from search.merge.kernels import chosen_mode
from search.merge.kernels.library import library
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)
library(chosen_mode())  # compiled here where it is not yet, not within the time of a test

Array = NDArray[np.float64]
WEIGHTS = st.floats(-2.0, 2.0, allow_nan=False, width=32)
DENSITIES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))
SIZES = st.sampled_from([1, 2, 7, 1000, 1024, 1025, 5000])


def models_of(count: int, size: int, seed: int, *, coarse: bool = False) -> dict[str, Tensor]:
    """A base and `count` models near it; coarse ones have few distinct differences, so many are equal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator)
    if coarse:
        base = torch.zeros(size)
    models = {"base": base}
    for index in range(count):
        step = torch.randn(size, generator=generator)
        models[f"m{index}"] = base + ((step * 4).round() / 8 if coarse else 0.3 * step)
    return models


def recipe_of(
    operator: str,
    sources: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    needs_base = operator not in ("linear", "slerp")
    names = list(dict.fromkeys([*(["base"] if needs_base else []), *sources]))
    return Recipe.from_data(
        {
            "base": "base" if needs_base else None,
            "models": {name: {"path": name} for name in names},
            "rules": [{"operator": operator, "sources": sources, "parameters": shared or {}}],
            **more,
        }
    )


def merge(recipe: Recipe, models: Mapping[str, Tensor], **options: Any) -> Array:
    engine = Merger({name: InMemoryTensors({"w": values}) for name, values in models.items()}, **options)
    result = np.asarray(dict(engine.merge_tensors(recipe))["w"].double())
    return result


def close(found: Array, wanted: Array, models: Mapping[str, Tensor], gain: float = 1.0) -> None:
    """Equal but for float32 rounding of terms as large as the inputs, times `gain`."""
    size = max(float(values.abs().max()) for values in models.values())
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * size * max(gain, 1.0))


def trim(delta: Array, density: float) -> Array:
    """The k largest magnitudes; of equal ones those with the lowest index."""
    if density >= 1:
        return delta
    if density <= 0:
        return np.zeros_like(delta)
    k = max(1, int(density * delta.size))
    order = np.argsort(-np.abs(delta), kind="stable")
    result = np.zeros_like(delta)
    result[order[:k]] = delta[order[:k]]
    return result


def mask(size: int, density: float, seed: int, model: str) -> Array:
    """The definition of `search.merge.masks`, in Python's unbounded integers; for the first segment."""
    text = b"meiosis mask 2\0%d\0w\0%s\0" % (seed, model.encode())
    z = (int.from_bytes(hashlib.sha256(text).digest()[:8], "little") + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    kept = []
    for index in range(size):
        x = (z + index // 2) % 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15) ^ (z >> 32)) * 0x735A2D97 % 2**32
        x ^= x >> 15
        kept.append(((x >> 16 * (index % 2)) % 2**16 ^ 2**15) < round(density * 2**16))
    return np.array(kept, dtype=np.float64)


def rescale(delta: Array, trimmed: Array) -> Array:
    before, after = np.abs(delta).sum(), np.abs(trimmed).sum()
    return trimmed if min(before, after) < 1e-7 else trimmed * (before / after)


def elect(deltas: list[Array], weights: list[float], normalize: bool) -> Array:
    terms = np.stack([np.float32(weight) * delta for weight, delta in zip(weights, deltas, strict=True)])
    sign = np.where(terms.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(terms) == sign
    total: Array = (terms * agree).sum(0)
    if not normalize:
        return total
    share: Array = (np.array(weights, np.float32)[:, None] * agree).sum(0)
    total /= np.where(share == 0, 1.0, share)
    return total


def unpack(models: Mapping[str, Tensor]) -> tuple[Array, list[Array]]:
    """The base, and the differences from it as float32 has them."""
    base = models["base"]
    deltas = [np.asarray((values - base).double()) for name, values in models.items() if name != "base"]
    return np.asarray(base.double()), deltas


# --- linear


@given(size=SIZES, weights=st.lists(WEIGHTS, min_size=1, max_size=5), normalize=st.booleans())
@settings(max_examples=40)
def test_linear_is_the_weighted_sum(size: int, weights: list[float], normalize: bool) -> None:
    total = sum(weights)
    assume(not normalize or abs(total) > 0.05)
    models = models_of(len(weights), size, 1)
    sources = {f"m{i}": {"weight": weight} for i, weight in enumerate(weights)}
    wanted = sum(weight * np.asarray(models[f"m{i}"].double()) for i, weight in enumerate(weights))
    found = merge(recipe_of("linear", sources, {"normalize": normalize}), models)
    gain = sum(map(abs, weights)) / (abs(total) if normalize else 1.0)
    close(found, np.asarray(wanted) / (total if normalize else 1.0), models, gain)


@given(chosen=st.integers(0, 3), normalize=st.booleans())
def test_linear_with_one_weight_of_one_gives_that_model_bit_for_bit(chosen: int, normalize: bool) -> None:
    models = models_of(4, 3000, 2)
    sources = {f"m{i}": {"weight": float(i == chosen)} for i in range(4)}
    found = merge(recipe_of("linear", sources, {"normalize": normalize}), models)
    assert np.array_equal(found, np.asarray(models[f"m{chosen}"].double()))


def test_linear_by_hand() -> None:
    models = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, -2.0])}
    sources = {"a": {"weight": 1.0}, "b": {"weight": 3.0}}
    assert merge(recipe_of("linear", sources), models).tolist() == [4.0, -1.0]
    assert merge(recipe_of("linear", sources, {"normalize": False}), models).tolist() == [16.0, -4.0]


def test_the_base_may_be_a_source_where_no_differences_are_taken() -> None:
    models = models_of(1, 100, 3)
    found = merge(recipe_of("linear", {"base": {"weight": 1.0}, "m0": {"weight": 0.0}}), models)
    assert np.array_equal(found, np.asarray(models["base"].double()))


# --- task arithmetic


@given(
    size=SIZES,
    weights=st.lists(WEIGHTS, min_size=1, max_size=5),
    normalize=st.booleans(),
    scale=st.floats(-2, 2),
)
@settings(max_examples=40)
def test_task_arithmetic_is_the_base_plus_weighted_differences(
    size: int, weights: list[float], normalize: bool, scale: float
) -> None:
    total = float(np.array(weights, np.float32).sum())
    assume(abs(total) > 0.05 or total == 0)
    models = models_of(len(weights), size, 4)
    base, deltas = unpack(models)
    divisor = total if normalize and total else 1.0
    sources = {f"m{i}": {"weight": weight} for i, weight in enumerate(weights)}
    found = merge(recipe_of("task_arithmetic", sources, {"normalize": normalize, "lambda": scale}), models)
    task = sum((weight * delta for weight, delta in zip(weights, deltas, strict=True)), np.zeros(size))
    close(found, base + scale * task / divisor, models, abs(scale) * sum(map(abs, weights)) / abs(divisor))


@given(count=st.integers(1, 4), chosen=st.integers(0, 3), seed=st.integers(0, 5))
def test_task_arithmetic_with_one_weight_of_one_gives_that_model(count: int, chosen: int, seed: int) -> None:
    chosen %= count
    models = models_of(count, 2000, seed)
    sources = {f"m{i}": {"weight": float(i == chosen)} for i in range(count)}
    found = merge(recipe_of("task_arithmetic", sources), models)
    wanted = models[f"m{chosen}"]
    # x - base and base + (x - base) each round once, by half a unit of the larger operand.
    unit = torch.maximum(wanted.abs(), models["base"].abs()).double() * 2.0**-23
    assert bool((torch.from_numpy(found) - wanted.double()).abs().le(unit).all())


def test_weights_of_zero_give_the_base_bit_for_bit() -> None:
    models = models_of(2, 2000, 5)
    for operator in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        found = merge(recipe_of(operator, {"m0": {"weight": 0.0}, "m1": {"weight": 0.0}}), models)
        assert np.array_equal(found, np.asarray(models["base"].double()))


# --- slerp


@given(size=st.sampled_from([2, 5, 1024, 3000]), t=st.floats(-0.5, 1.5), seed=st.integers(0, 20))
@settings(max_examples=40)
def test_slerp_turns_one_vector_into_the_other(size: int, t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, v = torch.randn(size, generator=generator), 2 * torch.randn(size, generator=generator)
    x, y = np.asarray(a.double()), np.asarray(v.double())
    cosine = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assume(abs(abs(cosine) - 0.9995) > 1e-6)
    if abs(cosine) > 0.9995:
        wanted = (1 - t) * x + t * y
    else:
        angle = math.acos(cosine)
        wanted = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    found = merge(recipe_of("slerp", {"a": {}, "v": {}}, {"t": t}), {"a": a, "v": v})
    close(found, wanted, {"a": a, "v": v}, 1 / math.sqrt(1 - min(cosine**2, 0.999)))


@pytest.mark.parametrize(("t", "parent"), [(0.0, "a"), (1.0, "v")])
def test_the_ends_of_slerp_are_its_sources_in_the_order_of_the_rule(t: float, parent: str) -> None:
    generator = torch.Generator().manual_seed(0)
    models = {"a": torch.randn(500, generator=generator), "v": torch.randn(500, generator=generator)}
    found = merge(recipe_of("slerp", {"a": {}, "v": {}}, {"t": t}), models)
    assert np.array_equal(found, np.asarray(models[parent].double()))
    swapped = merge(recipe_of("slerp", {"v": {}, "a": {}}, {"t": 1 - t}), models)
    assert np.array_equal(found, swapped)


def test_slerp_halfway_between_right_angles_by_hand() -> None:
    models = {"a": torch.tensor([2.0, 0.0]), "v": torch.tensor([0.0, 4.0])}
    found = merge(recipe_of("slerp", {"a": {}, "v": {}}, {"t": 0.5}), models)
    np.testing.assert_allclose(found, [math.sqrt(2), 2 * math.sqrt(2)], rtol=1e-7)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0])
def test_slerp_is_linear_between_colinear_antipodal_and_vanishing_vectors(factor: float) -> None:
    a = torch.randn(300, generator=torch.Generator().manual_seed(1))
    found = merge(recipe_of("slerp", {"a": {}, "v": {}}, {"t": 0.25}), {"a": a, "v": factor * a})
    if factor:
        close(found, np.asarray(a.double()) * (0.75 + 0.25 * factor), {"a": a})
    else:  # a vector of no length is at a right angle to all others
        close(found, np.asarray(a.double()) * math.sin(0.75 * math.pi / 2), {"a": a})


# --- ties


@given(
    size=SIZES,
    settings_=st.lists(st.tuples(WEIGHTS, DENSITIES), min_size=1, max_size=4),
    coarse=st.booleans(),
    normalize=st.booleans(),
    rescaled=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_ties_trims_elects_and_averages(
    size: int, settings_: list[tuple[float, float]], coarse: bool, normalize: bool, rescaled: bool
) -> None:
    models = models_of(len(settings_), size, 6, coarse=coarse)
    base, deltas = unpack(models)
    weights = [float(np.float32(weight)) for weight, _ in settings_]
    trimmed = [trim(delta, density) for delta, (_, density) in zip(deltas, settings_, strict=True)]
    if rescaled:
        trimmed = [rescale(delta, kept) for delta, kept in zip(deltas, trimmed, strict=True)]
    terms = np.stack([weight * kept for weight, kept in zip(weights, trimmed, strict=True)])
    # Where the terms cancel to within rounding, the elected sign is a matter of rounding too; a share of
    # nearly nothing likewise.
    firm = (np.abs(terms.sum(0)) > 1e-5 * np.abs(terms).sum(0)) | (np.abs(terms).sum(0) == 0)
    wanted = base + elect(trimmed, weights, normalize)
    sources = {f"m{i}": {"weight": w, "density": d} for i, (w, d) in enumerate(settings_)}
    found = merge(recipe_of("ties", sources, {"normalize": normalize, "rescale": rescaled}), models)
    gain = 4 * float(np.abs(terms).max(initial=1.0))
    if normalize:  # weights of both signs, or tiny ones, may leave a share of nearly nothing
        agree = np.sign(terms) == np.where(terms.sum(0) >= 0, 1.0, -1.0)
        share = np.abs((np.array(weights)[:, None] * agree).sum(0))
        firm &= ~agree.any(0) | (share > 0.05)
        gain /= 0.05
    close(found[firm], wanted[firm], models, gain)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("density", [0.0005, 0.1, 0.5, 0.93])
def test_ties_keeps_exactly_the_k_largest_of_a_large_tensor(coarse: bool, density: float) -> None:
    # Large enough for count tables; coarse differences have a handful of distinct magnitudes.
    size = 150_001
    models = models_of(2, size, 7, coarse=coarse)
    base, deltas = unpack(models)
    for block_elements in (1024, 1 << 18):
        sources = {"m0": {"weight": 1.0, "density": density}}
        found = merge(recipe_of("ties", sources), models, block_elements=block_elements)
        wanted = trim(deltas[0], density)
        if coarse:
            assert np.array_equal(found, base + wanted)
        assert np.array_equal(found != base, wanted != 0)
        both = {**sources, "m1": {"weight": 1.0, "density": 0.3}}
        found = merge(recipe_of("ties", both), models, block_elements=block_elements)
        close(found, base + elect([wanted, trim(deltas[1], 0.3)], [1.0, 1.0], True), models)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 700, 1024, 1025, 2047, 30_001])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_prepared_thresholds_are_those_that_counting_finds(size: int, coarse: bool, kernels: Any) -> None:
    models = models_of(1, size, 3, coarse=coarse)
    delta = models["m0"] - models["base"]

    def inputs(cache: int) -> TensorInputs:
        return TensorInputs(
            name="w",
            models=("m0",),
            sources=(models["m0"],),
            base="base",
            base_tensor=models["base"],
            seed=0,
            device=torch.device("cpu"),
            block_elements=1024,
            scratch=Scratch(),
            cache=RecentValues(cache),
            kernels=kernels,
        )

    prepared = [prepare_thresholds(inputs(1))]
    order = torch.sort(delta.abs(), descending=True, stable=True)
    for density in (1, 2, 3, 77, 512, 1023):
        k = max(1, density * size // 1024)
        if k == size:
            continue
        (wanted,) = find_thresholds(inputs(1), prepared, {0: k}).values()
        (counted,) = find_thresholds(inputs(1), [{}], {0: k}).values()
        assert wanted.value == counted.value == float(order.values[k - 1])
        for found in (wanted, counted):
            kept = torch.nn.functional.hardshrink(delta, 0.0)
            MagnitudeTrim(found, torch.float32)(kept, 0)
            assert torch.equal(kept, torch.from_numpy(trim(np.asarray(delta.double()), k / size + 1e-12)).float())


def test_ties_of_a_model_that_did_not_change_keeps_the_base() -> None:
    for size in (1000, 100_000):
        models = models_of(1, size, 8)
        models["m1"] = models["base"].clone()
        sources = {"m1": {"weight": 1.0, "density": 0.4}}
        assert np.array_equal(merge(recipe_of("ties", sources), models), np.asarray(models["base"].double()))


def test_ties_by_hand() -> None:
    models = {
        "base": torch.zeros(4),
        "a": torch.tensor([3.0, -1.0, 2.0, 0.5]),
        "b": torch.tensor([-1.0, -4.0, 1.0, 0.25]),
    }
    sources = {"a": {"weight": 1.0, "density": 0.5}, "b": {"weight": 1.0, "density": 0.75}}
    # a keeps 3 and 2; b keeps -1 (index 0 before the equal 1 has room for both), -4 and 1.
    assert merge(recipe_of("ties", sources), models).tolist() == [3.0, -4.0, 1.5, 0.0]
    found = merge(recipe_of("ties", sources, {"normalize": False, "lambda": 2.0}), models)
    assert found.tolist() == [6.0, -8.0, 6.0, 0.0]


def test_the_trim_of_a_smaller_density_is_part_of_that_of_a_larger_one() -> None:
    models = models_of(1, 80_000, 9, coarse=True)
    kept = None
    for density in (0.05, 0.2, 0.21, 0.7):
        found = merge(recipe_of("ties", {"m0": {"weight": 1.0, "density": density}}), models) != 0
        assert kept is None or not (kept & ~found).any()
        kept = found


# --- dare


@given(
    size=st.sampled_from([1, 3, 1000, 1025]),
    settings_=st.lists(st.tuples(st.floats(0.125, 2.0, width=32), DENSITIES), min_size=1, max_size=3),
    normalize=st.booleans(),
    rescaled=st.booleans(),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_dare_masks_rescales_and_merges(
    size: int, settings_: list[tuple[float, float]], normalize: bool, rescaled: bool, seed: int
) -> None:
    models = models_of(len(settings_), size, 10)
    base, deltas = unpack(models)
    weights = [weight for weight, _ in settings_]
    masked = [d * mask(size, p, seed, f"m{i}") for i, (d, (_, p)) in enumerate(zip(deltas, settings_, strict=True))]
    if rescaled:
        masked = [rescale(delta, kept) for delta, kept in zip(deltas, masked, strict=True)]
    sources = {f"m{i}": {"weight": w, "density": p} for i, (w, p) in enumerate(settings_)}
    shared = {"normalize": normalize, "rescale": rescaled}
    terms = np.stack([weight * kept for weight, kept in zip(weights, masked, strict=True)])
    gain = float(np.abs(terms).sum(0).max()) / min(weights)

    summed = terms.sum(0) / (sum(weights) if normalize else 1.0)
    found = merge(recipe_of("dare_linear", sources, shared, seed=seed), models)
    close(found, base + summed, models, gain)

    firm = (np.abs(terms.sum(0)) > 1e-5 * np.abs(terms).sum(0)) | (np.abs(terms).sum(0) == 0)
    found = merge(recipe_of("dare_ties", sources, shared, seed=seed), models)
    close(found[firm], (base + elect(masked, weights, normalize))[firm], models, gain)


@pytest.mark.parametrize(("dare", "plain"), [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")])
def test_dare_at_density_1_is_the_plain_method_bit_for_bit(dare: str, plain: str) -> None:
    models = models_of(3, 5000, 11)
    sources = {f"m{i}": {"weight": 0.4 + 0.1 * i} for i in range(3)}
    for normalize in (True, False):
        shared = {"normalize": normalize}
        assert np.array_equal(
            merge(recipe_of(dare, sources, shared), models), merge(recipe_of(plain, sources, shared), models)
        )


def test_rescaled_dare_keeps_the_l1_norm_of_the_task_vector() -> None:
    models = models_of(1, 20_000, 12)
    base, (delta,) = unpack(models)
    for density in (0.05, 0.5, 0.9):
        found = merge(recipe_of("dare_linear", {"m0": {"weight": 1.0, "density": density}}), models)
        np.testing.assert_allclose(np.abs(found - base).sum(), np.abs(delta).sum(), rtol=1e-5)


def test_dare_without_rescaling_drops_elements_and_keeps_the_rest() -> None:
    models = models_of(1, 20_000, 13)
    sources = {"m0": {"weight": 1.0, "density": 0.6}}
    found = merge(recipe_of("dare_linear", sources, {"rescale": False}), models)
    full = merge(recipe_of("task_arithmetic", {"m0": {"weight": 1.0}}), models)
    base = np.asarray(models["base"].double())
    dropped = mask(20_000, 0.6, 0, "m0") == 0
    assert np.array_equal(found, np.where(dropped, base, full))


# --- all of them


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
@given(order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_sources_does_not_matter(operator: str, order: list[int]) -> None:
    models = models_of(4, 2000, 14)
    sources: dict[str, dict[str, float]] = {f"m{i}": {"weight": 0.25 * (i + 1)} for i in range(4)}
    if operator != "linear" and operator != "task_arithmetic":
        sources = {name: {**values, "density": 0.6} for name, values in sources.items()}
    wanted = merge(recipe_of(operator, sources), models)
    found = merge(recipe_of(operator, {f"m{i}": sources[f"m{i}"] for i in order}), models)
    close(found, wanted, models, 4.0)


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_values_that_are_not_numbers_are_not_hidden(operator: str) -> None:
    for size in (100, 100_000):
        models = models_of(2, size, 15)
        models["m0"][17] = float("nan")
        density = {} if operator == "task_arithmetic" else {"density": 0.999}
        sources = {f"m{i}": {"weight": 1.0, **density} for i in range(2)}
        found = merge(recipe_of(operator, sources, seed=1), models)
        assert np.isnan(found[17])

"""Random masks are a function of seed, tensor, model and index, and of nothing else."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.merge.inputs import RecentValues, Scratch, TensorInputs
from search.merge.masks import CounterMask

torch.set_num_threads(1)

MODULUS = 1 << 64


def inputs_for(elements: int, *, seed: int = 0, name: str = "w", device: str = "cpu") -> TensorInputs:
    zeros = torch.zeros(elements, device=device)
    return TensorInputs(
        name=name,
        models=("a",),
        sources=(zeros,),
        base="base",
        base_tensor=zeros,
        seed=seed,
        device=torch.device(device),
        block_elements=1 << 20,
        scratch=Scratch(),
        cache=RecentValues(8),
    )


def kept(
    elements: int,
    density: float,
    *,
    seed: int = 0,
    name: str = "w",
    model: str = "a",
    start: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Which of the elements from `start` on a mask keeps."""
    values = torch.ones(elements, dtype=dtype)
    CounterMask(inputs_for(elements, seed=seed, name=name), model, density)(values, start)
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    return values.bool()


def uniform(seed: int, name: str, model: str, index: int) -> float:
    """The definition, in Python's unbounded integers."""
    text = b"meiosis mask 1\0" + str(seed).encode() + b"\0" + name.encode() + b"\0" + model.encode() + b"\0"
    key = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    z = (key + (index // 2 + 1) * 0x9E3779B97F4A7C15) % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    z = z ^ (z >> 31)
    return ((z >> 32 * (index % 2)) & 0x7FFFFFFF) / 2**31


@given(
    seed=st.integers(0, 2**63),
    name=st.text(max_size=20),
    model=st.text(max_size=8),
    half=st.integers(0, 2**40),
    elements=st.integers(1, 9),
    density=st.floats(0.0, 1.0),
)
def test_a_mask_is_what_the_definition_says(
    seed: int, name: str, model: str, half: int, elements: int, density: float
) -> None:
    mask = kept(elements, density, seed=seed, name=name, model=model, start=2 * half)
    level = round(density * 2**31) / 2**31
    assert mask.tolist() == [uniform(seed, name, model, 2 * half + i) < level for i in range(elements)]


def test_the_draw_of_one_seed_never_changes() -> None:
    # Written down, so that a recipe gives the same model in years to come.
    digest = hashlib.sha256(bytes(kept(4096, 0.5, seed=7, name="model.norm.weight").tolist())).hexdigest()
    again = [uniform(7, "model.norm.weight", "a", i) < 0.5 for i in range(4096)]
    assert digest == hashlib.sha256(bytes(again)).hexdigest()
    assert digest.startswith("0d5ac4277a966004")


@given(low=st.floats(0.0, 1.0), high=st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_masks_are_nested_over_densities(low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert not bool((kept(3000, low) & ~kept(3000, high)).any())


@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 0.5, 0.9, 0.999])
def test_the_share_kept_is_the_density(density: float) -> None:
    elements = 1_000_000
    mask = kept(elements, density)
    error = 4.5 * (density * (1 - density) / elements) ** 0.5
    assert abs(mask.double().mean().item() - density) < error
    for half in (mask[::2], mask[1::2]):  # both halves of each 64-bit draw
        assert abs(half.double().mean().item() - density) < 1.5 * error


def test_density_0_keeps_nothing_and_density_1_everything() -> None:
    assert not kept(5000, 0.0).any()
    assert kept(5000, 1.0).all()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"name": "x"}, {"model": "b"}, {"name": "w ", "model": "a"}, {"start": 1 << 20}]
)
def test_masks_of_other_seeds_tensors_models_and_places_are_independent(other: dict[str, object]) -> None:
    elements, density = 400_000, 0.3
    first, second = kept(elements, density), kept(elements, density, **other)  # type: ignore[arg-type]
    both = (first & second).double().mean().item()
    assert abs(both - density**2) < 4.5 * (density**2 * (1 - density**2) / elements) ** 0.5


def test_neighbours_are_independent() -> None:
    mask, density = kept(1_000_000, 0.5).double() - 0.5, 0.5
    for lag in (1, 2, 3, 64, 1024):
        correlation = (mask[lag:] * mask[:-lag]).mean().item() / (density * (1 - density))
        assert abs(correlation) < 4.5e-3


@given(cuts=st.lists(st.integers(1, 499), max_size=6, unique=True))
@settings(max_examples=30)
def test_a_mask_does_not_depend_on_how_the_tensor_is_cut(cuts: list[int]) -> None:
    whole = kept(1000, 0.4)
    bounds = [0, *sorted(2 * cut for cut in cuts), 1000]
    parts = [kept(stop - start, 0.4, start=start) for start, stop in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_mask_does_not_depend_on_the_dtype() -> None:
    assert torch.equal(kept(3001, 0.4, dtype=torch.float64), kept(3001, 0.4))


def test_kept_elements_keep_their_bits() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    masked = values.clone()
    CounterMask(inputs_for(5000), "a", 0.5)(masked, 0)
    mask = kept(5000, 0.5)
    assert torch.equal(masked[mask], values[mask])
    assert not masked[~mask].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_mask_does_not_depend_on_the_device() -> None:
    values = torch.ones(100_001, device="cuda")
    CounterMask(inputs_for(100_001, device="cuda"), "a", 0.4)(values, 1 << 33)
    assert torch.equal(values.bool().cpu(), kept(100_001, 0.4, start=1 << 33))

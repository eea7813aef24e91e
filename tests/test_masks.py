"""Random masks are a function of seed, tensor, model and index, and of nothing else."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.merge.inputs import RecentValues, Scratch, TensorInputs
from search.merge.mask_norms import masked_norms
from search.merge.masks import CounterMask

torch.set_num_threads(1)


def inputs_for(
    elements: int,
    *,
    seed: int = 0,
    name: str = "w",
    device: str = "cpu",
    values: torch.Tensor | None = None,
    kernels: Any = "torch",
    block_elements: int = 1 << 20,
) -> TensorInputs:
    zeros = torch.zeros(elements, device=device)
    return TensorInputs(
        name=name,
        models=("a",),
        sources=(zeros if values is None else values,),
        base="base",
        base_tensor=zeros,
        seed=seed,
        device=torch.device(device),
        block_elements=block_elements,
        scratch=Scratch(),
        cache=RecentValues(8),
        kernels=kernels,
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
    text = b"meiosis mask 2\0" + str(seed).encode() + b"\0" + name.encode() + b"\0" + model.encode() + b"\0"
    key = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    z = (key + ((index >> 20) + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    x = (z + index % 2**20 // 2) % 2**32
    x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
    x = (x ^ (x >> 15) ^ (z >> 32)) * 0x735A2D97 % 2**32
    x ^= x >> 15
    return ((x >> 16 * (index % 2)) % 2**16 ^ 2**15) / 2**16


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
    level = round(density * 2**16) / 2**16
    assert mask.tolist() == [uniform(seed, name, model, 2 * half + i) < level for i in range(elements)]


def test_the_draw_of_one_seed_never_changes() -> None:
    # Written down, so that a recipe gives the same model in years to come.
    digest = hashlib.sha256(bytes(kept(4096, 0.5, seed=7, name="model.norm.weight").tolist())).hexdigest()
    again = [uniform(7, "model.norm.weight", "a", i) < 0.5 for i in range(4096)]
    assert digest == hashlib.sha256(bytes(again)).hexdigest()
    assert digest.startswith("a06c7ce7b74954a2")


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
    for half in (mask[::2], mask[1::2]):  # both halves of each word
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


def test_both_halves_of_a_word_are_uniform_and_independent_of_each_other_and_of_the_next_word() -> None:
    elements = 1 << 22
    mask = CounterMask(inputs_for(1 << 20), "a", 0.5)
    drawn = torch.cat([mask.draw(1 << 20, start).clone() for start in range(0, elements, 1 << 20)])
    assert (int(drawn.min()), int(drawn.max())) == (0, 65535)
    coarse = drawn >> 11  # 32 classes
    for first, second in ((coarse[0::2], coarse[1::2]), (coarse[1:-1:2], coarse[2::2]), (coarse[:-2], coarse[2:])):
        table = torch.bincount(first * 32 + second, minlength=1024).double()
        expected = table.sum() / 1024
        chi = float(((table - expected) ** 2 / expected).sum())
        assert abs(chi - 1023) < 5 * (2 * 1023) ** 0.5
    fine = torch.bincount(drawn, minlength=65536).double()
    assert abs(float(((fine - 64) ** 2 / 64).sum()) - 65535) < 5 * (2 * 65535) ** 0.5


def test_segments_have_keys_of_their_own() -> None:
    segment = 1 << 20
    across = kept(4096, 0.5, start=segment - 2048)
    assert torch.equal(across[:2048], kept(2048, 0.5, start=segment - 2048))
    assert torch.equal(across[2048:], kept(2048, 0.5, start=segment))
    apart = (kept(segment, 0.5).double() - 0.5) * (kept(segment, 0.5, start=segment).double() - 0.5)
    assert abs(float(apart.mean())) < 4.5 * 0.25 / segment**0.5


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@given(levels=st.lists(st.integers(1, 65535), min_size=1, max_size=3), seed=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_norms_of_masked_vectors_are_those_of_a_plain_sum(kernels: str, levels: list[int], seed: int) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 10.0 ** (seed * 8 - 8)
    inputs = inputs_for(5000, seed=seed, values=values, kernels=kernels)
    for level in [*levels, 64 * (levels[0] // 64) or 64]:  # the last is on the grid that shares a pass
        mask = CounterMask(inputs, "a", level / 65536)
        norms = masked_norms(inputs, 0, mask)
        keep = mask.draw(5000, 0) < level
        size = values.double().abs()
        assert norms.whole == pytest.approx(float(size.sum()), rel=1e-9)
        assert norms.kept == pytest.approx(float(size[keep].sum()), rel=1e-9)


def test_norms_have_the_same_bits_by_block_and_kernel_and_on_and_off_the_grid() -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(2))
    found = set()
    for kernels in ("torch", "auto"):
        for block in (1024, 1 << 20):
            inputs = inputs_for(70_001, values=values, kernels=kernels, block_elements=block)
            found.add(masked_norms(inputs, 0, CounterMask(inputs, "a", 0.5)))
            again = inputs_for(70_001, values=values, kernels=kernels, block_elements=block)
            found.add(masked_norms(again, 0, CounterMask(again, "a", 0.5)))
    assert len(found) == 1


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

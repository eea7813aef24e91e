"""Which elements torch's sort and topk put where, without the sort."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.errors import UserError
from search.merge.inputs import Scratch, TensorInputs
from search.merge.kernels import build, order, passes
from search.merge.kernels.library import library

torch.set_num_threads(1)

try:
    CODE = library("native")
except UserError:
    CODE = None

native_only = pytest.mark.skipif(CODE is None, reason="needs a C++ compiler")


def without(values: Tensor, indices: Tensor) -> Tensor:
    dropped = torch.ones(values.numel(), dtype=torch.bool)
    dropped[indices] = False
    return dropped


def killer(size: int) -> Tensor:
    """Numbers that make every median of three a bad pivot (Musser 1997), so that a quicksort gives up on them."""
    half = size // 2
    first = [i if i % 2 else half + i - 1 for i in range(1, half + 1)]
    values = torch.tensor([*first, *range(2, 2 * half + 1, 2), *range(2 * half + 1, size + 1)])
    return values.float()


@st.composite
def numbers(draw: st.DrawFn) -> Tensor:
    size = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 1000, 4096, 20_000])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    match draw(st.sampled_from(["few", "many", "ascending", "descending", "equal", "killer"])):
        case "few":
            return torch.randint(draw(st.integers(1, 40)), (size,), generator=generator).float()
        case "many":
            return torch.randn(size, generator=generator).abs()
        case "ascending":
            return torch.arange(size).div(3, rounding_mode="floor").float()
        case "descending":
            return torch.arange(size).flip(0).div(3, rounding_mode="floor").float()
        case "equal":
            return torch.full((size,), 2.0)
        case _:
            return killer(size)


@given(
    values=numbers(),
    places=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    how=st.sampled_from(["ascending", "descending", "stable"]),
)
@settings(max_examples=300, deadline=None)
def test_ranks_are_those_of_the_sort_of_torch(values: Tensor, places: tuple[float, float], how: Any) -> None:
    low, high = sorted(round(place * values.numel()) for place in places)
    found = order.all_but_ranks(values, low, high, how, mode="auto")
    wanted = torch.argsort(values, descending=how == "descending", stable=how == "stable")[low:high]
    assert found.equal(without(values, wanted))


@given(values=numbers(), share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1 / 64, 1 / 65, 1.0])))
@settings(max_examples=300, deadline=None)
def test_the_largest_are_those_of_topk(values: Tensor, share: float) -> None:
    count = int(share * values.numel())
    found = order.all_but_largest(values, count, mode="auto")
    assert found.equal(without(values, values.topk(count).indices))


@native_only
def test_this_torch_is_followed_by_the_native_code_and_where_it_is_not_torch_sorts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert order._agreeing("native") is CODE  # where this fails, merges are slower but right

    class Wrong:
        """Keeps the first ones, whatever they are."""

        def meiosis_sorted(self, _: int, size: int, low: int, high: int, __: int, out: int) -> int:
            ctypes.memset(out, 1, size)
            ctypes.memset(out, 0, high - low)
            return 0

        def meiosis_largest_of(self, _: int, size: int, count: int, out: int) -> int:
            return self.meiosis_sorted(0, size, 0, count, 0, out)

    order._agreeing.cache_clear()
    monkeypatch.setattr(order, "library", lambda mode: Wrong())
    try:
        assert order._agreeing("native") is None
        values = torch.tensor([1.0, 5.0, 3.0, 5.0])
        assert order.all_but_ranks(values, 0, 2, "descending", mode="native").tolist() == [True, False, True, False]
    finally:
        order._agreeing.cache_clear()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_breaks_nothing(bad: float) -> None:
    # Such models are refused, by what reads them beside the merge.
    values = torch.randn(5000).abs()
    values[::7] = bad
    how: Any
    for how in ("ascending", "descending", "stable"):
        found = order.all_but_ranks(values, 100, 2000, how, mode="auto")
        assert int(found.logical_not().sum()) == 1900
    assert int(order.all_but_largest(values, 2000, mode="auto").logical_not().sum()) == 2000


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", ["float32", "inputs"])
@pytest.mark.parametrize("kind", ["near", "coarse", "equal", "zero"])
def test_an_element_at_a_rank_is_that_of_a_stable_sort(kind: str, compute: Any, dtype: torch.dtype) -> None:
    size = passes.SAMPLED_ELEMENTS + 12_345
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(size, generator=generator)
    step = 0.1 * torch.randn(size, generator=generator)
    step = {"near": step, "coarse": (step * 20).round() / 16, "equal": torch.ones(size), "zero": torch.zeros(size)}[
        kind
    ]
    base, source = base.to(dtype), (base + step).to(dtype)
    inputs = TensorInputs(
        name="w",
        models=("a",),
        sources=(source,),
        base="base",
        base_tensor=base,
        seed=0,
        device=torch.device("cpu"),
        block_elements=1 << 16,
        scratch=Scratch(),
        cache={},
        compute=compute,
        kernels="native",
    )
    wide = dtype if compute == "inputs" else torch.float32
    magnitudes = (source.to(wide) - base.to(wide)).abs().float()
    for largest_first in (False, True):
        ordered = torch.argsort(magnitudes, descending=largest_first, stable=True)
        for rank in (0, 1, 777, size // 2, int(0.9 * size), size - 1):
            found = passes.element_at_rank(inputs, 0, rank, largest_first=largest_first)
            if found is None:  # so many equal ones that counting is better
                assert kind != "near"
                continue
            assert found.flat == int(ordered[rank])
            assert found.bits == int(magnitudes.view(torch.int32)[found.flat])
    if kind == "near":
        low, high = (passes.element_at_rank(inputs, 0, rank) for rank in (size // 3, size - 99))
        ordered = torch.argsort(magnitudes, stable=True)
        for places, kept in (((low, high), ordered[size // 3 : size - 99]), ((None, low), ordered[: size // 3])):
            listed = passes.all_but_between(inputs, 0, *places)
            assert listed is not None
            assert listed.equal(without(magnitudes, kept))


def test_the_code_is_built_of_all_its_files() -> None:
    assert {path.stem for path in build._sources()} == {"merge", "narrow", "order", "passes"}

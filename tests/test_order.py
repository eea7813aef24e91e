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
from search.merge.kernels import build, order
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


@given(values=numbers(), places=st.tuples(st.floats(0, 1), st.floats(0, 1)), descending=st.booleans())
@settings(max_examples=300, deadline=None)
def test_ranks_are_those_of_the_sort_of_torch(values: Tensor, places: tuple[float, float], descending: bool) -> None:
    low, high = sorted(round(place * values.numel()) for place in places)
    found = order.all_but_ranks(values, low, high, descending=descending, mode="auto")
    assert found.equal(without(values, torch.argsort(values, descending=descending)[low:high]))


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
        assert order.all_but_ranks(values, 0, 2, descending=True, mode="native").tolist() == [True, False, True, False]
    finally:
        order._agreeing.cache_clear()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_breaks_nothing(bad: float) -> None:
    # Such models are refused, by what reads them beside the merge.
    values: Any = torch.randn(5000).abs()
    values[::7] = bad
    for descending in (False, True):
        found = order.all_but_ranks(values, 100, 2000, descending=descending, mode="auto")
        assert int(found.logical_not().sum()) == 1900
    assert int(order.all_but_largest(values, 2000, mode="auto").logical_not().sum()) == 2000


def test_the_code_is_built_of_all_its_files() -> None:
    assert {path.stem for path in build._sources()} == {"merge", "narrow", "order", "passes"}

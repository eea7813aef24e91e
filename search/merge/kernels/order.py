"""The elements that torch's sort and topk put into a range of ranks, by native code that does not sort the rest.

Which of equal numbers come first is left open by torch: it follows from the algorithm of its build. The native code
follows that of builds with the GNU C++ library, and is used where it is seen to agree with the torch that is here.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch
from torch import Tensor

from search.merge.kernels import Mode
from search.merge.kernels.library import library
from search.merge.kernels.passes import MOST_INDEXED

PROBES = (300, 5000, 70_000)
"""Elements of the tensors on which both are compared."""


Order = Literal["ascending", "descending", "stable"]
"""Of magnitudes: as torch sorts them by default, or ascending with equal ones as they lie."""

_NUMBERS: dict[Order, int] = {"ascending": 0, "descending": 1, "stable": 2}


def all_but_ranks(values: Tensor, low: int, high: int, order: Order, *, mode: Mode) -> Tensor:
    """(elements,) bool: False for those that torch's sort puts at ranks [low, high).

    Args:
        values: (elements,) magnitudes.
        mode: which kernels may be used.
    """
    code = (library(mode) if order == "stable" else _agreeing(mode)) if _fits(values) else None
    if code is not None:
        dropped = torch.empty(values.numel(), dtype=torch.bool)
        place = values.data_ptr(), values.numel(), low, high, _NUMBERS[order], dropped.data_ptr()
        if not code.meiosis_sorted(*place):
            return dropped
    return _without(values, _sorted(values, order)[low:high])


def _sorted(values: Tensor, order: Order) -> Tensor:
    return torch.argsort(values, descending=order == "descending", stable=order == "stable")


def all_but_largest(values: Tensor, count: int, *, mode: Mode) -> Tensor:
    """(elements,) bool: False for those that `torch.topk(values, count)` finds. Arguments as of `all_but_ranks`."""
    code = _agreeing(mode) if _fits(values) else None
    if code is not None:
        dropped = torch.empty(values.numel(), dtype=torch.bool)
        if not code.meiosis_largest_of(values.data_ptr(), values.numel(), count, dropped.data_ptr()):
            return dropped
    return _without(values, values.topk(count).indices)


def _without(values: Tensor, indices: Tensor) -> Tensor:
    dropped = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    dropped[indices] = False
    return dropped


def _fits(values: Tensor) -> bool:
    plain: bool = values.dtype == torch.float32 and values.device.type == "cpu"
    return plain and bool(values.is_contiguous()) and values.numel() <= MOST_INDEXED


@functools.cache
def _agreeing(mode: Mode) -> ctypes.CDLL | None:
    """The library, if its order is that of this torch."""
    code = library(mode)
    if code is None:
        return None
    generator = torch.Generator().manual_seed(0)
    for size in PROBES:
        values = torch.randint(size // 20, (size,), generator=generator).float()  # of each about twenty
        dropped = torch.empty(size, dtype=torch.bool)
        low, high = size // 3 + 7, size - size // 4
        for order, number in _NUMBERS.items():
            code.meiosis_sorted(values.data_ptr(), size, low, high, number, dropped.data_ptr())
            if not dropped.equal(_without(values, _sorted(values, order)[low:high])):
                return None
        for count in (size // 100, low):
            code.meiosis_largest_of(values.data_ptr(), size, count, dropped.data_ptr())
            if not dropped.equal(_without(values, values.topk(count).indices)):
                return None
    return code

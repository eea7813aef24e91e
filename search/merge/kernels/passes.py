"""Passes over one task vector in native code: counts of magnitudes, and sums of what masks keep.

Each function gives None where the kernels cannot do it; plain torch then does the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search.merge.inputs import TensorInputs
from search.merge.kernels.library import TYPES, Source, library
from search.merge.kernels.threads import run_in_parts
from search.merge.operator import Inputs


class _Difference(NamedTuple):
    """A task vector as the library is told of it."""

    code: ctypes.CDLL
    source: Source
    base: int
    base_type: int
    elements: int

    def call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self.code, f"meiosis_{name}")
        return function(ctypes.addressof(self.source), self.base, self.base_type, *arguments)

    def call_in_parts(self, name: str, sums: Callable[[], Tensor], *arguments: Any) -> Tensor:
        """Call for parts of the tensor at once, each with sums of its own; their total."""
        parts: list[Tensor] = []

        def work(start: int, stop: int) -> None:
            own = sums()
            self.call(name, start, stop, *arguments, own.data_ptr())
            parts.append(own)

        run_in_parts(self.elements, work)
        return torch.stack(parts).sum(0)


def count_magnitudes(inputs: Inputs, index: int, upper: int) -> Tensor | None:
    """How many magnitudes of source `index` have which upper 15 bits (`upper` -1) or, with these upper bits,
    which lower 16 bits; int64."""
    difference = _difference(inputs, index)
    if difference is None:
        return None
    bins = 1 << (15 if upper < 0 else 16)
    return difference.call_in_parts("count", lambda: torch.zeros(bins, dtype=torch.int64), upper)


def find_equal(inputs: Inputs, index: int, bits: int, rank: int) -> int | None:
    """Flat index of the `rank`-th element (from 1) of source `index` whose magnitude has these bits."""
    difference = _difference(inputs, index)
    return None if difference is None else int(difference.call("find", difference.elements, bits, rank))


def largest_magnitude(inputs: Inputs, index: int) -> float | None:
    """The largest magnitude of source `index`; not finite if one is not."""
    difference = _difference(inputs, index)
    if difference is None:
        return None
    return float(difference.call("largest", 0, difference.elements))


def sum_masked(inputs: Inputs, index: int, key: int, level: int, scale: float) -> Tensor | None:
    """(1025,) int64: sums of floor(scale * magnitude) by the upper 10 bits of u, and where u is below the level."""
    difference = _difference(inputs, index)
    if difference is None:
        return None
    difference.source.key, difference.source.level = key, level
    return difference.call_in_parts("mask_sums", lambda: torch.zeros(1025, dtype=torch.int64), scale)


def _difference(inputs: Inputs, index: int) -> _Difference | None:
    if not isinstance(inputs, TensorInputs) or inputs.dtype not in TYPES or inputs.device.type != "cpu":
        return None
    stored = inputs.stored
    if stored is None or stored[1] is None:
        return None
    tensor, base = stored[0][index], stored[1]
    if any(one.dtype not in TYPES or not one.is_contiguous() or one.device.type != "cpu" for one in (tensor, base)):
        return None
    code = library(inputs.kernels)
    if code is None:
        return None
    inputs.count_bytes(tensor, base)
    source = Source(data=tensor.data_ptr(), type=TYPES[tensor.dtype], rounded=TYPES[inputs.dtype])
    return _Difference(code, source, base.data_ptr(), TYPES[base.dtype], inputs.numel)

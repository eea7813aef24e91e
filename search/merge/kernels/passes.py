"""Passes over one task vector in native code: counts and ranks of magnitudes, and sums of what masks keep.

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

SAMPLE = 1 << 15
"""Elements that a range of values is told from."""

SAMPLE_MARGIN = 540
"""Ranks in a sample that are allowed for chance: six standard deviations at the median."""

SAMPLED_ELEMENTS = 1 << 19
"""Tensors with fewer elements are counted."""

MOST_INDEXED = 1 << 32
"""Tensors with more have indices that take more than the 32 bits below the magnitude."""

LARGEST_BITS = (1 << 31) - 1


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


class Ranked(NamedTuple):
    """An element in the order of magnitudes, equal ones as they lie: the bits of its magnitude, its flat index."""

    bits: int
    flat: int

    @property
    def key(self) -> int:
        """Orders as the elements do."""
        return self.bits << 32 | self.flat


def finds_ranks(inputs: Inputs) -> bool:
    """Whether `element_at_rank` is for this tensor."""
    return SAMPLED_ELEMENTS <= inputs.numel <= MOST_INDEXED and _native(inputs) is not None


def element_at_rank(inputs: Inputs, index: int, rank: int, *, largest_first: bool = False) -> Ranked | None:
    """The element of source `index` whose magnitude has this rank, 0 to elements - 1, in one pass.

    A sample says in which range of values it must lie, and the elements of that range are sorted: a few in a hundred.

    Args:
        largest_first: rank 0 is the largest, and among equal ones still the first; else the smallest.
    """
    difference = _difference(inputs, index) if finds_ranks(inputs) else None
    if difference is None:
        return None
    low, high = _range_of(inputs, index, inputs.numel - 1 - rank if largest_first else rank)
    parts: list[Tensor] = []
    below: list[int] = []

    def work(start: int, stop: int) -> None:
        room, under = torch.empty((stop - start) // 8 + (1 << 12), dtype=torch.int64), ctypes.c_int64()
        place = low, high, room.numel(), room.data_ptr(), ctypes.addressof(under)
        count = difference.call("collect", start, stop, *place)
        parts.append(room[: max(count, 0)])
        below.append(under.value if count >= 0 else -inputs.numel)

    run_in_parts(inputs.numel, work)
    keys = torch.cat(parts).numpy()
    if largest_first:
        keys = keys ^ (LARGEST_BITS << 32)
        rank -= inputs.numel - sum(below) - len(keys)
    else:
        rank -= sum(below)
    if sum(below) < 0 or not 0 <= rank < len(keys):  # the sample misled, or there are too many equal ones
        return None
    keys.partition(rank)
    key = int(keys[rank]) ^ (LARGEST_BITS << 32 if largest_first else 0)
    return Ranked(key >> 32, key & 0xFFFFFFFF)


def all_but_between(inputs: Inputs, index: int, low: Ranked | None, high: Ranked | None) -> Tensor | None:
    """(elements,) bool: False for the elements of source `index` from `low` up to, but without, `high`."""
    difference = _difference(inputs, index) if inputs.numel <= MOST_INDEXED else None
    if difference is None:
        return None
    dropped = torch.empty(inputs.numel, dtype=torch.bool)
    keys = 0 if low is None else low.key, 1 << 63 if high is None else high.key
    run_in_parts(inputs.numel, lambda start, stop: difference.call("list", start, stop, *keys, dropped.data_ptr()))
    return dropped


def _range_of(inputs: Inputs, index: int, rank: int) -> tuple[int, int]:
    """Bits of two magnitudes that enclose that of a rank, in all likelihood."""
    assert isinstance(inputs, TensorInputs)
    assert inputs.stored is not None
    assert inputs.stored[1] is not None
    step = inputs.numel // SAMPLE | 1  # an even step would stay in a few columns of most matrices
    source, base = (tensor[::step].to(inputs.dtype) for tensor in (inputs.stored[0][index], inputs.stored[1]))
    sample = (source - base).abs_().float().view(torch.int32).sort().values
    at, margin = rank // step, SAMPLE_MARGIN
    low = int(sample[at - margin]) if at >= margin else 0
    high = int(sample[at + margin]) if at + margin < sample.numel() else LARGEST_BITS
    return low, high


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


def _native(inputs: Inputs) -> ctypes.CDLL | None:
    """The library, if it reads tensors like these."""
    if not isinstance(inputs, TensorInputs) or inputs.dtype not in TYPES or inputs.device.type != "cpu":
        return None
    stored = inputs.stored
    if stored is None or stored[1] is None:
        return None
    known = (one.dtype in TYPES and one.is_contiguous() and one.device.type == "cpu" for one in (*stored[0], stored[1]))
    return library(inputs.kernels) if all(known) else None


def _difference(inputs: Inputs, index: int) -> _Difference | None:
    code = _native(inputs)
    if code is None:
        return None
    assert isinstance(inputs, TensorInputs)
    assert inputs.stored is not None
    tensor, base = inputs.stored[0][index], inputs.stored[1]
    assert base is not None
    inputs.count_bytes(tensor, base)
    source = Source(data=tensor.data_ptr(), type=TYPES[tensor.dtype], rounded=TYPES[inputs.dtype])
    return _Difference(code, source, base.data_ptr(), TYPES[base.dtype], inputs.numel)

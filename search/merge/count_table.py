"""The k largest magnitudes of a task vector, exactly, without sorting at every candidate.

Once per node (`prepare`) the magnitudes are sorted, and the thresholds of all densities that are a multiple
of 1/1024 are kept; searches move on that grid. For any other k of a large tensor one pass of native code is enough
(`search.merge.kernels.passes`). Else it is found by counting: one pass counts the upper
bits of abs(float32 delta), which names the bin that holds the k-th largest magnitude, one more the lower
bits within that bin, which gives the value itself. Equal values at the threshold are kept in order of their
index, lowest first, until k are kept; a further pass finds the last of them, if not all fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from search.merge.kernels.passes import MOST_INDEXED, count_magnitudes, element_at_rank, find_equal
from search.merge.operator import Block, Inputs

GRID = 1024
"""Thresholds are prepared for densities that are a multiple of 1 / GRID."""

_UPPER_BITS, _LOWER_BITS = 15, 16
"""A positive float32 has 31 bits: 8 of exponent and 7 of fraction above, 16 of fraction below."""


@dataclass(frozen=True)
class Threshold:
    """Keep magnitudes above `value`, and those equal to it up to the flat index `last` (inclusive)."""

    value: float
    last: int


def prepare_thresholds(inputs: Inputs) -> dict[str, Tensor]:
    """Thresholds of one source: `values` (float32) and `last` (int64), for every k of the grid, ascending.

    With up to GRID elements, for every k. Empty for float64, and beyond MOST_INDEXED elements. Takes 8 bytes
    an element while it works.
    """
    if inputs.dtype == torch.float64 or not 0 < inputs.numel <= MOST_INDEXED:
        return {}
    keys = torch.empty(inputs.numel, dtype=torch.int64, device=inputs.device)
    for block in inputs.blocks():
        bits = _magnitude_bits(inputs, block, 0)
        # Ascending keys: large magnitudes first, of equal ones those with the lowest index.
        part = keys[block.start : block.stop]
        part.copy_(bits).neg_().add_(2**31 - 1).bitwise_left_shift_(32)
        part.add_(torch.arange(block.start, block.stop, device=inputs.device))
    if inputs.device.type == "cpu":
        keys.numpy().sort()  # several times faster than torch
    else:
        keys = torch.sort(keys).values
    at = keys[torch.tensor([k - 1 for k in _grid(inputs.numel)], device=inputs.device)].cpu()
    values = (2**31 - 1 - (at >> 32)).to(torch.int32).view(torch.float32)
    return {"values": values, "last": at & (2**32 - 1)}


def _grid(size: int) -> list[int]:
    """The ks of the grid."""
    if size <= GRID:
        return list(range(1, size + 1))
    return [max(1, step * size // GRID) for step in range(1, GRID)]


def _on_grid(k: int, size: int) -> int | None:
    """The position of k in the grid."""
    if size <= GRID:
        return k - 1
    step = -(-k * GRID // size)
    return step - 1 if 0 < step < GRID and step * size // GRID == k else None


def find_thresholds(
    inputs: Inputs, prepared: Sequence[Mapping[str, Tensor]], wanted: Mapping[int, int]
) -> dict[int, Threshold]:
    """The thresholds of some sources of a tensor: looked up, or as few passes as needed for all together.

    Args:
        prepared: what `prepare_thresholds` returned, one mapping per source; may be empty.
        wanted: index of the source -> k, with 1 <= k < number of elements.
    """
    found: dict[int, Threshold] = {}
    missing: dict[int, int] = {}
    keys = {i: ("threshold", inputs.name, inputs.base, inputs.models[i], k) for i, k in wanted.items()}
    for index, k in wanted.items():
        place = _on_grid(k, inputs.numel)
        if prepared and prepared[index] and place is not None:
            table = prepared[index]
            found[index] = Threshold(float(table["values"][place]), int(table["last"][place]))
        elif keys[index] in inputs.cache:
            found[index] = inputs.cache[keys[index]]
        else:
            missing[index] = k
    for index, k in dict(missing).items():
        element = element_at_rank(inputs, index, k - 1, largest_first=True)
        if element is not None:
            found[index] = inputs.cache[keys[index]] = Threshold(_number(element.bits), element.flat)
            del missing[index]
    if missing:
        select = _select_directly if inputs.dtype == torch.float64 else _select_by_counts
        for index, threshold in select(inputs, missing).items():
            found[index] = inputs.cache[keys[index]] = threshold
    return found


def _delta(inputs: Inputs, block: Block, index: int) -> Tensor:
    delta = inputs.scratch("delta")[: block.stop - block.start]
    return torch.sub(block.sources[index], block.base, out=delta).abs_()


def _magnitude_bits(inputs: Inputs, block: Block, index: int) -> Tensor:
    """(elements of the block,) int32: magnitudes ordered as their bits."""
    return _delta(inputs, block, index).float().view(torch.int32)


def _select_directly(inputs: Inputs, wanted: Mapping[int, int]) -> dict[int, Threshold]:
    found = {}
    for index, k in wanted.items():
        magnitudes = torch.empty(inputs.numel, dtype=inputs.dtype, device=inputs.device)
        for block in inputs.blocks():
            magnitudes[block.start : block.stop] = _delta(inputs, block, index)
        value = torch.kthvalue(magnitudes, inputs.numel - k + 1).values
        spare = k - int((magnitudes > value).sum())
        equal = (magnitudes == value).nonzero().flatten()
        # A magnitude that is no number never equals the threshold; the merge is not finite anyway.
        last = int(equal[spare - 1]) if 0 < spare <= equal.numel() else inputs.numel - 1
        found[index] = Threshold(float(value), last)
    return found


def _select_by_counts(inputs: Inputs, wanted: Mapping[int, int]) -> dict[int, Threshold]:
    upper = _count(inputs, dict.fromkeys(wanted, -1))
    places = {index: _from_top(upper[index], k) for index, k in wanted.items()}
    lower = _count(inputs, {index: place for index, (place, _) in places.items()})
    bits: dict[int, int] = {}
    spare: dict[int, int] = {}  # how many of the values equal to the threshold are kept
    for index, (place, rank) in places.items():
        position, left = _from_top(lower[index], rank)
        bits[index] = (place << _LOWER_BITS) + position
        # All zeros, or all equal values fit: nothing to look for.
        if bits[index] and left != int(lower[index][position]):
            spare[index] = left
    last = _last_of_equals(inputs, bits, spare) if spare else {}
    values = {index: _number(one) for index, one in bits.items()}
    return {index: Threshold(value, last.get(index, inputs.numel - 1)) for index, value in values.items()}


def _number(bits: int) -> float:
    """The float32 with these bits."""
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


def _count(inputs: Inputs, uppers: Mapping[int, int]) -> dict[int, Tensor]:
    """Per source, int64: how many magnitudes have which upper bits (-1) or, among those with these upper bits,
    which lower ones."""
    native = {index: count_magnitudes(inputs, index, upper) for index, upper in uppers.items()}
    if all(counts is not None for counts in native.values()):
        return {index: counts for index, counts in native.items() if counts is not None}
    counts = {
        index: torch.zeros(1 << (_UPPER_BITS if upper < 0 else _LOWER_BITS), dtype=torch.int64, device=inputs.device)
        for index, upper in uppers.items()
    }
    for block in inputs.blocks():
        for index, upper in uppers.items():
            bits = _magnitude_bits(inputs, block, index)
            if upper < 0:
                counts[index] += torch.bincount(bits.bitwise_right_shift_(_LOWER_BITS), minlength=1 << _UPPER_BITS)
                continue
            # Other bins fall into the two outer counts: quicker than comparing, which writes slow bools.
            bits.sub_(upper << _LOWER_BITS).clamp_(-1, 1 << _LOWER_BITS).add_(1)
            counts[index] += torch.bincount(bits, minlength=(1 << _LOWER_BITS) + 2)[1:-1]
    return {index: counted.cpu() for index, counted in counts.items()}


def _from_top(counts: Tensor, k: int) -> tuple[int, int]:
    """Position of the k-th largest in a histogram, and its rank from the top within that position."""
    above = counts.flip(0).cumsum(0)
    back = int(torch.searchsorted(above, torch.tensor(k)))
    before = int(above[back - 1]) if back else 0
    return counts.numel() - 1 - back, k - before


def _last_of_equals(inputs: Inputs, bits_at: Mapping[int, int], spare: Mapping[int, int]) -> dict[int, int]:
    """Flat index of the `spare`-th element, in order of index, whose magnitude is exactly the threshold."""
    native = {index: find_equal(inputs, index, bits_at[index], rank) for index, rank in spare.items()}
    if all(place is not None for place in native.values()):
        return {index: place for index, place in native.items() if place is not None}
    left = dict(spare)
    last: dict[int, int] = {}
    for block in inputs.blocks():
        for index in list(left):
            equal = _magnitude_bits(inputs, block, index) == bits_at[index]
            count = int(equal.sum())
            if count >= left[index]:
                last[index] = block.start + int(equal.nonzero()[left[index] - 1])
                del left[index]
            else:
                left[index] -= count
        if not left:
            break
    return last


class MagnitudeTrim:
    """Zeroes what a threshold drops, with one comparison per element.

    Attributes:
        trims: False for thresholds that drop nothing: 0, or no number.
        last: elements up to this index keep magnitudes above `bound`, those beyond above `value`.
    """

    def __init__(self, threshold: Threshold, dtype: torch.dtype) -> None:
        self.value = threshold.value
        self.trims = self.value != 0.0 and math.isfinite(self.value)
        # hardshrink keeps abs(x) > bound, so the next smaller number keeps abs(x) >= value.
        value = torch.tensor(threshold.value, dtype=dtype)
        self.bound = float(torch.nextafter(value, torch.zeros((), dtype=dtype)))
        self.last = threshold.last

    def __call__(self, delta: Tensor, start: int) -> None:
        """Apply in place to the elements from `start` on."""
        if not self.trims:
            return
        split = min(max(self.last + 1 - start, 0), delta.numel())
        for part, bound in ((delta[:split], self.bound), (delta[split:], self.value)):
            if part.numel():
                torch.hardshrink(part, bound, out=part)

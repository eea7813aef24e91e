"""The k largest magnitudes of a task vector, exactly, without sorting or holding it.

A count table over the upper bits of abs(float32 delta) is made once per node (`prepare`). For any k it
names the bin that holds the k-th largest magnitude; one pass counts the lower bits within that bin,
which gives the value itself. Equal values at the threshold are kept in order of their index, lowest
first, until k are kept; a further pass finds the last of them, if not all fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from search.merge.operator import Block, Inputs

SMALL_ELEMENTS = 1 << 16
"""Up to this many elements the magnitudes are gathered and selected directly, without a table."""

_UPPER_BITS, _LOWER_BITS = 15, 16
"""A positive float32 has 31 bits: 8 of exponent and 7 of fraction above, 16 of fraction below."""


@dataclass(frozen=True)
class Threshold:
    """Keep magnitudes above `value`, and those equal to it up to the flat index `last` (inclusive)."""

    value: float
    last: int


def count_magnitudes(inputs: Inputs) -> dict[str, Tensor]:
    """The table of one source: `counts` (int64, one per occupied range of bins) and `first` (its start).

    Empty for small tensors and for float64, which are selected directly.
    """
    if _is_direct(inputs):
        return {}
    counts = torch.zeros(1 << _UPPER_BITS, dtype=torch.int64)
    total = counts.to(inputs.device)
    for block in inputs.blocks():
        bits = _magnitude_bits(inputs, block, 0)
        total += torch.bincount(bits.bitwise_right_shift_(_LOWER_BITS), minlength=1 << _UPPER_BITS)
    counts = total.cpu()
    occupied = counts.nonzero().flatten()
    first = int(occupied[0])
    return {"counts": counts[first : int(occupied[-1]) + 1].clone(), "first": torch.tensor([first])}


def find_thresholds(
    inputs: Inputs, prepared: Sequence[Mapping[str, Tensor]], wanted: Mapping[int, int]
) -> dict[int, Threshold]:
    """The thresholds of some sources of a tensor, as few passes as needed for all of them together.

    Args:
        prepared: what `count_magnitudes` returned, one mapping per source.
        wanted: index of the source -> k, with 1 <= k < number of elements.
    """

    def key(index: int) -> tuple[object, ...]:
        return ("threshold", inputs.name, inputs.base, inputs.models[index], wanted[index])

    missing = {index: k for index, k in wanted.items() if key(index) not in inputs.cache}
    if missing:
        select = _select_directly if _is_direct(inputs) else _select_by_table
        found = select(inputs, prepared, missing)
        for index in missing:
            inputs.cache[key(index)] = found[index]
        # Read from what was found, not from the cache: the cache may be smaller than the tensor's sources.
        return {i: found[i] if i in found else inputs.cache[key(i)] for i in wanted}
    return {index: inputs.cache[key(index)] for index in wanted}


def _is_direct(inputs: Inputs) -> bool:
    return inputs.numel <= SMALL_ELEMENTS or inputs.dtype != torch.float32


def _delta(inputs: Inputs, block: Block, index: int) -> Tensor:
    assert block.base is not None
    delta = inputs.scratch("magnitudes")[: block.stop - block.start]
    torch.sub(block.sources[index], block.base, out=delta)
    return delta.abs_()


def _magnitude_bits(inputs: Inputs, block: Block, index: int) -> Tensor:
    """abs(float32 delta) as int32: nonnegative floats order like the integers of their bits."""
    return _delta(inputs, block, index).view(torch.int32)


def _select_directly(
    inputs: Inputs, prepared: Sequence[Mapping[str, Tensor]], wanted: Mapping[int, int]
) -> dict[int, Threshold]:
    whole = {i: torch.empty(inputs.numel, dtype=inputs.dtype, device=inputs.device) for i in wanted}
    for block in inputs.blocks():
        for index, magnitudes in whole.items():
            magnitudes[block.start : block.stop] = _delta(inputs, block, index)
    found = {}
    for index, k in wanted.items():
        magnitudes = whole[index]
        value = torch.kthvalue(magnitudes, inputs.numel - k + 1).values
        spare = k - int((magnitudes > value).sum())
        equal = (magnitudes == value).nonzero().flatten()
        # A magnitude that is no number never equals the threshold; the merge is not finite anyway.
        last = int(equal[spare - 1]) if 0 < spare <= equal.numel() else inputs.numel - 1
        found[index] = Threshold(float(value), last)
    return found


def _select_by_table(
    inputs: Inputs, prepared: Sequence[Mapping[str, Tensor]], wanted: Mapping[int, int]
) -> dict[int, Threshold]:
    bins: dict[int, int] = {}
    rank: dict[int, int] = {}  # rank of the threshold within its bin, from the top, starting at 1
    lower: dict[int, Tensor] = {}
    for index, k in wanted.items():
        bins[index], rank[index] = _from_top(prepared[index]["counts"], k)
        bins[index] += int(prepared[index]["first"])
        lower[index] = torch.zeros(1 << _LOWER_BITS, dtype=torch.int64, device=inputs.device)
    for block in inputs.blocks():
        for index in wanted:
            bits = _magnitude_bits(inputs, block, index)
            # Other bins fall into the two outer counts: quicker than comparing, which writes slow bools.
            low = bins[index] << _LOWER_BITS
            bits.sub_(low).clamp_(-1, 1 << _LOWER_BITS).add_(1)
            lower[index] += torch.bincount(bits, minlength=(1 << _LOWER_BITS) + 2)[1:-1]
    bits_at: dict[int, int] = {}
    spare: dict[int, int] = {}  # how many of the values equal to the threshold are kept
    found: dict[int, Threshold] = {}
    for index in wanted:
        counts = lower[index].cpu()
        position, spare[index] = _from_top(counts, rank[index])
        bits_at[index] = (bins[index] << _LOWER_BITS) + position
        value = float(torch.tensor([bits_at[index]], dtype=torch.int32).view(torch.float32))
        found[index] = Threshold(value, inputs.numel - 1)
        # All zeros, or all equal values fit: nothing to look for.
        if value == 0.0 or spare[index] == int(counts[position]):
            del spare[index]
    if spare:
        for index, last in _last_of_equals(inputs, bits_at, spare).items():
            found[index] = Threshold(found[index].value, last)
    return found


def _from_top(counts: Tensor, k: int) -> tuple[int, int]:
    """Position of the k-th largest in a histogram, and its rank from the top within that position."""
    above = counts.flip(0).cumsum(0)
    back = int(torch.searchsorted(above, torch.tensor(k)))
    before = int(above[back - 1]) if back else 0
    return counts.numel() - 1 - back, k - before


def _last_of_equals(inputs: Inputs, bits_at: Mapping[int, int], spare: Mapping[int, int]) -> dict[int, int]:
    """Flat index of the `spare`-th element, in order of index, whose magnitude is exactly the threshold."""
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
    """Zeroes what a threshold drops, with one comparison per element."""

    def __init__(self, threshold: Threshold, dtype: torch.dtype) -> None:
        self._above = threshold.value
        # hardshrink keeps abs(x) > bound, so the next smaller number keeps abs(x) >= value.
        bound = torch.tensor(threshold.value, dtype=dtype)
        self._from = float(torch.nextafter(bound, torch.zeros((), dtype=dtype)))
        self._last = threshold.last

    def __call__(self, delta: Tensor, start: int) -> None:
        """Apply in place to the elements from `start` on."""
        if self._above == 0.0 or not math.isfinite(self._above):
            return
        split = min(max(self._last + 1 - start, 0), delta.numel())
        for part, bound in ((delta[:split], self._from), (delta[split:], self._above)):
            if part.numel():
                torch.hardshrink(part, bound, out=part)

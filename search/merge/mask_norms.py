"""L1 norms of task vectors under random masks, for all densities of a grid from one pass.

Magnitudes are added as whole numbers, in units that make the sum fit 63 bits: the order of additions,
and with it block size, threads and device, then does not matter. The unit is a power of two, so that
a magnitude is cut off below 2^-62 times the number of elements times the largest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from search.merge.kernels.passes import largest_magnitude, sum_masked
from search.merge.masks import LEVELS, CounterMask
from search.merge.operator import Inputs

BUCKETS = 1024
"""Densities on this grid share one pass."""


class Norms(NamedTuple):
    """L1 norms of a task vector, whole and masked."""

    whole: float
    kept: float


class _Table(NamedTuple):
    """Sums below each multiple of 1 / BUCKETS, of the task vector under one stream of masks."""

    key: int
    scale: float
    below: Tensor  # (BUCKETS + 1,) int64


def masked_norms(inputs: Inputs, index: int, mask: CounterMask) -> Norms:
    """The L1 norms of the task vector of source `index` before and after a mask.

    The first density on the grid of 1 / BUCKETS takes a pass for the largest magnitude and one for the sums;
    the next of the same seed take none. Any other density takes a pass.
    """
    place = ("mask norms", inputs.name, inputs.base, inputs.models[index])  # one seed at a time
    table: _Table | None = inputs.cache.get(place)
    on_grid = mask.level % (LEVELS // BUCKETS) == 0
    if table is None or table.key != mask.key or not on_grid:
        exponent = ("largest magnitude", *place[1:])
        if exponent not in inputs.cache:
            inputs.cache[exponent] = _largest(inputs, index)
        largest = inputs.cache[exponent]
        if not math.isfinite(largest):
            return Norms(math.nan, math.nan)
        if largest == 0.0:
            return Norms(0.0, 0.0)
        scale = 2.0 ** (62 - inputs.numel.bit_length() - math.frexp(largest)[1])
        sums = _sums(inputs, index, mask, scale)
        below = torch.cat([torch.zeros(1, dtype=torch.int64), sums[:BUCKETS].cumsum(0)])
        if not on_grid:
            return Norms(int(below[-1]) / scale, int(sums[BUCKETS]) / scale)
        table = inputs.cache[place] = _Table(mask.key, scale, below)
    kept = table.below[mask.level // (LEVELS // BUCKETS)]
    return Norms(int(table.below[-1]) / table.scale, int(kept) / table.scale)


def _largest(inputs: Inputs, index: int) -> float:
    """The largest magnitude of a task vector; not finite if one of its elements is not."""
    found = largest_magnitude(inputs, index)
    if found is not None:
        return found
    largest = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
    for block in inputs.blocks():
        delta = inputs.scratch("delta")[: block.stop - block.start]
        torch.sub(block.sources[index], block.base, out=delta)
        largest = torch.maximum(largest, delta.abs_().max())  # what is no number stays
    return float(largest)


def _sums(inputs: Inputs, index: int, mask: CounterMask, scale: float) -> Tensor:
    """(BUCKETS + 1,) int64: sums by u, and the sum of what the mask keeps."""
    found = sum_masked(inputs, index, mask.key, mask.level, scale)
    if found is not None:
        return found
    sums = torch.zeros(BUCKETS + 1, dtype=torch.int64, device=inputs.device)
    for block in inputs.blocks():
        elements = block.stop - block.start
        delta = inputs.scratch("delta")[:elements]
        torch.sub(block.sources[index], block.base, out=delta)
        whole = delta.abs_().double().mul_(scale).long()
        drawn = mask.draw(elements, block.start)
        sums[BUCKETS] += whole[drawn < mask.level].sum()
        sums[:BUCKETS].index_add_(0, drawn.bitwise_right_shift_(6), whole)
    return sums.cpu()

"""Random masks that keep an element the likelier, the larger it is among those of its row (DELLA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from search.merge.masks import LEVELS, CounterMask
from search.merge.operator import Inputs
from search.merge.rows import row_chunks
from search.merge.task_vectors import ListedTrim, Trim, Trimmed, keep_all, rescaled_factors


def probabilities(columns: int, density: float, epsilon: float) -> Tensor:
    """(columns,) float64: the probability of being kept, from the smallest magnitude of a row to the largest.

    density - epsilon to density + epsilon in even steps (Deep 2024, https://arxiv.org/abs/2406.11617); in a row
    of one element, the density.
    """
    if columns == 1:
        return torch.tensor([density], dtype=torch.float64)
    return density - epsilon + 2.0 * epsilon * torch.arange(columns, dtype=torch.float64) / (columns - 1)


def drop_by_magnitude(inputs: Inputs, per_source: Sequence[Mapping[str, Any]], rescale: bool) -> Trimmed:
    """Task vectors dropped by chance, the smallest of a row most likely."""
    trims: list[Trim] = []
    keys: list[object] = []
    for index, values in enumerate(per_source):
        density, epsilon = float(values["density"]), float(values["epsilon"])
        trims.append(keep_all if density >= 1.0 else _draw(inputs, index, density, epsilon))
        keys.append(("della", inputs.seed, density, epsilon))
    weights = [float(values["weight"]) for values in per_source]
    return Trimmed(trims, rescaled_factors(inputs, weights, trims, keys, rescale))


def _draw(inputs: Inputs, index: int, density: float, epsilon: float) -> ListedTrim:
    """Drops the elements whose uniform number, that of `search.merge.masks`, is not below their probability."""
    numbers = CounterMask(inputs, inputs.models[index], density)
    levels = _levels(inputs, index, density, epsilon)
    dropped = torch.empty(inputs.numel, dtype=torch.bool, device=inputs.device)
    for start, stop in inputs.ranges():
        torch.ge(numbers.draw(stop - start, start), levels[start:stop], out=dropped[start:stop])
    return ListedTrim(dropped)


def _levels(inputs: Inputs, index: int, density: float, epsilon: float) -> Tensor:
    """(numel,) int32: the probability of every element, in units of 1 / LEVELS.

    Rows are along the second axis; a vector is one row. Among equal magnitudes the later is the larger.
    """
    source, base = inputs.whole(index), inputs.whole(None)
    shape = source.shape
    if source.dim() < 2:
        source, base = source.reshape(1, -1), base.reshape(1, -1)
    moved = source.movedim(1, -1).shape
    source, base = (values.movedim(1, -1).reshape(-1, moved[-1]) for values in (source, base))
    rows, columns = source.shape
    by_rank = (probabilities(columns, density, epsilon) * LEVELS).round_().to(torch.int32).to(inputs.device)
    levels = torch.empty(rows, columns, dtype=torch.int32, device=inputs.device)
    for chunk in row_chunks(rows, columns):
        order = _ascending((source[chunk] - base[chunk]).abs_())
        levels[chunk] = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, by_rank.expand(order.shape))
    return levels.view(moved).movedim(-1, min(1, len(shape) - 1) if len(shape) > 1 else -1).reshape(-1)


def _ascending(magnitudes: Tensor) -> Tensor:
    """(rows, columns) int64: the columns of every row by magnitude, equal ones as they lie."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype == torch.float64:
        return magnitudes.argsort(dim=1, stable=True)
    keys = magnitudes.float().view(torch.int32).long().bitwise_left_shift_(32)
    keys.add_(torch.arange(magnitudes.shape[1]))
    keys.numpy().sort(axis=1)  # several times faster than torch
    return keys.bitwise_and_((1 << 32) - 1)

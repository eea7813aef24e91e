"""Task vectors without their smallest and their largest elements, as Model Breadcrumbs merges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from search.merge.kernels.passes import Ranked, all_but_between, element_at_rank, finds_ranks
from search.merge.operator import Block, Inputs
from search.merge.rankings import EVERYTHING, NOTHING, Cut, count, cuts, keep_ranks
from search.merge.task_vectors import ListedTrim, Trim, Trimmed, drop_all, keep_all, rescaled


def prepare_ranks(inputs: Inputs, index: int = 0) -> dict[str, Tensor]:
    """What `drop_small_and_large` needs of one source: a table of its magnitudes; none where it does without."""
    if inputs.compute == "inputs" or finds_ranks(inputs):
        return {}
    return count(inputs, lambda block: _magnitudes(inputs, block, index))


def kept_ranks(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Ranks of the kept magnitudes, ascending from 0: from the first up to, but without, the second.

    floor(density size) are kept, below the floor(gamma size) largest or else, where there are not
    enough, from the smallest on.
    """
    kept = min(int(density * size), size)
    low = max(0, size - kept - int(gamma * size))
    return low, low + kept


def drop_small_and_large(
    inputs: Inputs, prepared: Sequence[Mapping[str, Tensor]], per_source: Sequence[Mapping[str, Any]], rescale: bool
) -> Trimmed:
    """Task vectors without their smallest and largest elements."""
    ranks = [kept_ranks(inputs.numel, float(v["density"]), float(v["gamma"])) for v in per_source]
    trims = [_trim(inputs, prepared[index], index, *kept) for index, kept in enumerate(ranks)]
    return rescaled(inputs, per_source, trims, [("breadcrumbs", *kept) for kept in ranks], rescale)


def _trim(inputs: Inputs, table: Mapping[str, Tensor], index: int, low: int, high: int) -> Trim:
    if low == high:
        return drop_all
    if high - low == inputs.numel:
        return keep_all
    if inputs.compute == "inputs":
        return keep_ranks(inputs, index, low, high, "ascending")
    listed = _list(inputs, index, low, high)
    if listed is not None:
        return listed
    place = ("breadcrumbs", inputs.name, inputs.base, inputs.models[index], inputs.dtype)
    missing = [rank for rank in (low, high) if (*place, rank) not in inputs.cache]
    found: dict[int, Cut] = cuts(inputs, lambda block: _magnitudes(inputs, block, index), table, missing)
    for rank in missing:
        inputs.cache[*place, rank] = found[rank]
    lower, upper = (found[rank] if rank in found else inputs.cache[*place, rank] for rank in (low, high))

    def trim(delta: Tensor, start: int) -> None:
        for cut, drops_above in ((lower, False), (upper, True)):
            if cut in (EVERYTHING, NOTHING):
                continue
            split = min(max(cut.index - start, 0), delta.numel())
            for part, bound in ((delta[:split], cut.value), (delta[split:], _below(cut.value, delta.dtype))):
                above = torch.hardshrink(part, bound)  # quicker than what goes through bools
                part.copy_(part.sub_(above) if drops_above else above)

    return trim


def _list(inputs: Inputs, index: int, low: int, high: int) -> Trim | None:
    """The trim by native code, for large tensors."""
    if not finds_ranks(inputs):
        return None
    key = ("breadcrumbs places", inputs.name, inputs.base, inputs.models[index], inputs.dtype)
    places: list[Ranked | None] = []
    for rank in (low, high):
        outside = rank in (0, inputs.numel)
        if not outside and (*key, rank) not in inputs.cache:
            inputs.cache[*key, rank] = element_at_rank(inputs, index, rank)
        places.append(None if outside else inputs.cache[*key, rank])
        if places[-1] is None and not outside:
            return None
    dropped = all_but_between(inputs, index, *places)
    return None if dropped is None else ListedTrim(dropped)


def _below(value: float, dtype: torch.dtype) -> float:
    """The number of `dtype` before a positive one; 0 for 0."""
    number = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(number, torch.zeros((), dtype=dtype)))


def _magnitudes(inputs: Inputs, block: Block, index: int) -> Tensor:
    assert block.base is not None
    magnitudes = inputs.scratch("magnitudes")[: block.stop - block.start]
    return torch.sub(block.sources[index], block.base, out=magnitudes).abs_()

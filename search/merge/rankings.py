"""Order statistics of numbers computed from a tensor, exactly: block by block where they are not held.

The order is ascending; equal numbers follow each other as in the tensor. `count` makes, once per node, a table
over the upper halves of the bits of the float32 numbers; for any rank it names the range of values that holds
it, and one pass over the lower halves gives the value. A further pass finds the place among equal values
where the rank falls between them. In float64, and for small tensors, the numbers are gathered instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from search.merge.kernels.order import Order, all_but_ranks
from search.merge.operator import Block, Inputs
from search.merge.rows import wide
from search.merge.task_vectors import ListedTrim

Numbers = Callable[[Block], Tensor]
"""The numbers of one block: (elements,), which may be overwritten."""

GATHERED_ELEMENTS = 1 << 16
"""Up to this many elements there is no table."""

_HALF = 1 << 16


@dataclass(frozen=True)
class Cut:
    """Where a rank falls: numbers above `value` rank at or above it, and those equal to it from `index` on."""

    value: float
    index: int

    def at_or_above(self, numbers: Tensor, start: int) -> Tensor:
        """(elements,) bool for the numbers of the elements from `start` on."""
        split = min(max(self.index - start, 0), numbers.numel())
        return torch.cat((numbers[:split] > self.value, numbers[split:] >= self.value))


EVERYTHING = Cut(float("-inf"), 0)
NOTHING = Cut(float("inf"), 1 << 62)


def count(inputs: Inputs, numbers: Numbers) -> dict[str, Tensor]:
    """The table: `counts` (int64, over the occupied range) and `first` (its start); empty where none is needed."""
    if _gathers(inputs):
        return {}
    counts = torch.zeros(_HALF, dtype=torch.int64, device=inputs.device)
    for block in inputs.blocks():
        upper = _ordered(numbers(block)).bitwise_right_shift_(16).add_(_HALF // 2)
        counts += torch.bincount(upper, minlength=_HALF)
    counts = counts.cpu()
    occupied = counts.nonzero().flatten()
    first = int(occupied[0])
    return {"counts": counts[first : int(occupied[-1]) + 1].clone(), "first": torch.tensor([first])}


def cuts(inputs: Inputs, numbers: Numbers, table: Mapping[str, Tensor], ranks: Iterable[int]) -> dict[int, Cut]:
    """The cut of every rank, 0 for the smallest number. Rank 0 cuts below everything, `numel` above it.

    Args:
        table: what `count` returned; if empty, it is made again where it is needed.
    """
    found = {rank: EVERYTHING if rank <= 0 else NOTHING for rank in ranks if not 0 < rank < inputs.numel}
    wanted = sorted(set(ranks) - set(found))
    if wanted and _gathers(inputs):
        found |= _cuts_gathered(inputs, numbers, wanted)
    elif wanted:
        found |= _cuts_by_table(inputs, numbers, table or count(inputs, numbers), wanted)
    return found


def keep_ranks(inputs: Inputs, index: int, low: int, high: int, order: Order) -> ListedTrim:
    """Keeps the magnitudes of the task vector of source `index` at ranks [low, high).

    Which of equal magnitudes these are is, but in a stable order, left to torch's sort, as in mergekit: the same on
    every run of one build of torch on one kind of processor, and not elsewhere. Holds a byte for each element.
    """
    values = torch.empty(inputs.numel, dtype=wide(inputs.dtype), device=inputs.device)
    for block in inputs.blocks():
        assert block.base is not None
        delta = inputs.scratch("delta")[: block.stop - block.start]
        values[block.start : block.stop] = torch.sub(block.sources[index], block.base, out=delta).abs_()
    return ListedTrim(all_but_ranks(values, low, high, order, mode=inputs.kernels))


def _gathers(inputs: Inputs) -> bool:
    return inputs.numel <= GATHERED_ELEMENTS or inputs.dtype == torch.float64


def _cuts_gathered(inputs: Inputs, numbers: Numbers, ranks: Iterable[int]) -> dict[int, Cut]:
    every = torch.empty(inputs.numel, dtype=inputs.dtype, device=inputs.device)
    for block in inputs.blocks():
        every[block.start : block.stop] = numbers(block)
    found = {}
    for rank in ranks:
        value = every.kthvalue(rank + 1).values
        before = rank - int((every < value).sum())
        equal = (every == value).nonzero().flatten()
        # A number that is no number equals nothing; the merge is not finite anyway.
        found[rank] = Cut(float(value), int(equal[before]) if before < equal.numel() else inputs.numel)
    return found


def _cuts_by_table(
    inputs: Inputs, numbers: Numbers, table: Mapping[str, Tensor], ranks: Iterable[int]
) -> dict[int, Cut]:
    upper = {rank: _position(table["counts"], rank) for rank in ranks}  # bin, and rank within it
    first = int(table["first"]) - _HALF // 2
    bins = {place for place, _ in upper.values()}
    lower = {place: torch.zeros(_HALF, dtype=torch.int64, device=inputs.device) for place in bins}
    for block in inputs.blocks():
        bits = _ordered(numbers(block))
        for place, counts in lower.items():
            # Other bins fall into the two outer counts: quicker than comparing, which writes slow bools.
            within = (bits - ((first + place) << 16)).clamp_(-1, _HALF).add_(1)
            counts.add_(torch.bincount(within, minlength=_HALF + 2)[1:-1])
    found, before = {}, {}
    for rank, (place, rank_in_bin) in upper.items():
        position, ahead = _position(lower[place].cpu(), rank_in_bin)
        found[rank] = Cut(_number(((first + place) << 16) + position), 0)
        if ahead:
            before[rank] = ahead  # how many of the equal ones rank lower
    for rank, index in _index_among_equals(inputs, numbers, found, before).items():
        found[rank] = Cut(found[rank].value, index)
    return found


def _index_among_equals(
    inputs: Inputs, numbers: Numbers, found: Mapping[int, Cut], before: Mapping[int, int]
) -> dict[int, int]:
    left, index = dict(before), {}
    for block in inputs.blocks() if left else ():
        values = numbers(block)
        for rank in list(left):
            equal = (values == found[rank].value).nonzero().flatten()
            if left[rank] < equal.numel():
                index[rank] = block.start + int(equal[left.pop(rank)])
            else:
                left[rank] -= equal.numel()
        if not left:
            break
    return index


def _ordered(numbers: Tensor) -> Tensor:
    """int32 that order like the numbers: the bits of a float32, those of negative ones turned around."""
    bits = (numbers.float() + 0.0).view(torch.int32)  # + 0.0 makes one zero of two
    return bits ^ (bits.bitwise_right_shift(31) & 0x7FFFFFFF)


def _number(ordered: int) -> float:
    bits = torch.tensor([ordered], dtype=torch.int32)
    return float((bits ^ (bits.bitwise_right_shift(31) & 0x7FFFFFFF)).view(torch.float32))


def _position(counts: Tensor, rank: int) -> tuple[int, int]:
    """Position of a rank in a histogram, and its rank within that position."""
    upto = counts.cumsum(0)
    position = int(torch.searchsorted(upto, torch.tensor(rank), right=True))
    return position, rank - (int(upto[position - 1]) if position else 0)

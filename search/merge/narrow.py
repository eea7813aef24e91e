"""Sums of task vectors in bfloat16 or float16, rounded at every step as mergekit rounds them.

Differences, products, divisions and the last sum are rounded one by one; a sum over the sources is added
in float32 in their order and rounded once; weights are rounded before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from search.merge.operator import Block

NARROW = (torch.bfloat16, torch.float16)


class SumOfTaskVectors(Protocol):
    """What is needed of `search.merge.task_vectors.TaskVectors`."""

    @property
    def trims(self) -> Sequence[Callable[[Tensor, int], object]]: ...
    @property
    def rescales(self) -> Sequence[float]: ...
    @property
    def weights(self) -> Sequence[float]: ...
    @property
    def factors(self) -> Sequence[float]: ...
    @property
    def elects(self) -> bool: ...
    @property
    def divides(self) -> bool: ...
    @property
    def divisor(self) -> float: ...
    @property
    def scale(self) -> float: ...


def merge_narrow(task: SumOfTaskVectors, block: Block, out: Tensor) -> None:
    """One block of `task` in the dtype of `out`, one of `NARROW`."""
    dtype, device = out.dtype, out.device

    def rounded(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    terms = []
    for index, source in enumerate(block.sources):
        delta = source - block.base
        task.trims[index](delta, block.start)
        # The factor in two steps where it is a product.
        if task.rescales[index] != 1.0:
            delta.mul_(rounded(task.rescales[index])).mul_(rounded(task.weights[index]))
        else:
            delta.mul_(rounded(task.factors[index]))
        terms.append(delta)
    mixed = _sum(terms)
    if task.elects:
        positive = mixed >= 0
        kept = [(term > 0) & positive | (term < 0) & ~positive for term in terms]
        mixed = _sum([term.masked_fill(~keep, 0.0) for term, keep in zip(terms, kept, strict=True)])
        if task.divides:
            share = _sum([rounded(weight) * keep for weight, keep in zip(task.weights, kept, strict=True)])
            mixed.div_(share.masked_fill_(share == 0, 1.0))
    elif task.divides:
        mixed.div_(rounded(task.divisor))
    if task.scale != 1.0:
        mixed.mul_(task.scale)  # not rounded before
    torch.add(mixed, block.base, out=out)


def round_to(value: float, dtype: torch.dtype) -> float:
    """The nearest number of a dtype; float64 values stay."""
    return value if dtype in (torch.float32, torch.float64) else float(torch.tensor(value, dtype=dtype))


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0].float()
    for term in terms[1:]:
        total += term
    return total.to(terms[0].dtype)

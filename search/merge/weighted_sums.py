"""Weighted sums of whole models, as averages and spherical interpolation make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from search.merge.operator import Block, Inputs


@dataclass(frozen=True)
class WeightedSum:
    """sum_i factors[i] x_i, over `divisor` if there is one, as an `Apply`.

    The coefficients are data, so that a kernel can do the same in one pass. Computed in float32 (float64
    where an input has it), also where the recipe computes in the dtype of the inputs.

    Attributes:
        fused: whether products are added by fused multiply-add, else rounded first; in order of the sources.
    """

    inputs: Inputs
    factors: tuple[float, ...]
    divisor: float | None
    fused: bool

    def __call__(self, block: Block, out: Tensor) -> None:
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        values = [source.to(wide) for source in block.sources]
        total = out if out.dtype == wide else self.inputs.scratch("total", wide)[: out.numel()]
        step = self.inputs.scratch("step", wide)[: out.numel()]
        torch.mul(values[0], self.factors[0], out=total)
        for source, factor in zip(values[1:], self.factors[1:], strict=True):
            if self.fused:
                total.add_(source, alpha=factor)
            else:
                total.add_(torch.mul(source, factor, out=step))
        if self.divisor is not None:
            # A tensor, because CUDA divides by a Python number with its rounded reciprocal.
            total.div_(torch.tensor(self.divisor, dtype=wide, device=out.device))
        if total is not out:
            out.copy_(total)

"""Weighted averages of models, shared by the methods that average with statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from search.merge.inputs import sum_of_weights
from search.merge.operator import Apply, Block, Inputs


def plain_average(inputs: Inputs, weights: Sequence[float], scale: float) -> Apply:
    """x = sum_i w_i x_i / sum_i w_i, and base + scale (x - base) for a scale that is not 1."""
    total = torch.tensor(sum_of_weights(weights, inputs.dtype), dtype=inputs.dtype, device=inputs.device)

    def apply(block: Block, out: Tensor) -> None:
        torch.mul(block.sources[0], weights[0], out=out)
        for values, weight in zip(block.sources[1:], weights[1:], strict=True):
            out.add_(values, alpha=weight)
        out.div_(total)
        scale_from_base(out, block, scale)

    return apply


def scale_from_base(values: Tensor, block: Block, scale: float) -> None:
    """values := base + scale (values - base), in place; 1 leaves them without a look at the base."""
    if scale != 1.0:
        assert block.base is not None, "operators with this parameter read the base when it is not 1"
        values.sub_(block.base).mul_(scale).add_(block.base)

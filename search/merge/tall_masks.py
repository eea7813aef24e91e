"""TALL masks: where in a sum of task vectors one task is at home (Wang 2024, https://arxiv.org/abs/2405.07813).

With the multi-task vector m = sum_i w_i d_i, task t has the mask |w_t d_t| >= threshold |m - w_t d_t|: the elements
that the others have not moved away from it. The paper chooses thresholds from 0.2 to 0.6 by validation; our
default is 0.4, the middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from search.merge.operator import Block, Inputs


def multi_task_vector(inputs: Inputs, block: Block, weights: Sequence[float], out: Tensor) -> None:
    """m of a block into `out`. Uses the scratch buffer `delta`."""
    delta = inputs.scratch("delta")[: out.numel()]
    for index, (source, weight) in enumerate(zip(block.sources, weights, strict=True)):
        target = delta if index else out
        _task_vector(source, block, weight, target)
        if index:
            out.add_(delta)


def tall_mask(inputs: Inputs, block: Block, index: int, weight: float, threshold: float, total: Tensor) -> Tensor:
    """The mask of one task as ones and zeros. Uses the scratch buffers `delta` and `rest`; returns `delta`."""
    delta, rest = (inputs.scratch(name)[: total.numel()] for name in ("delta", "rest"))
    _task_vector(block.sources[index], block, weight, delta)
    torch.sub(total, delta, out=rest)
    rest.abs_().mul_(threshold)
    delta.abs_()
    return torch.ge(delta, rest, out=delta)


def _task_vector(source: Tensor, block: Block, weight: float, out: Tensor) -> None:
    torch.sub(source, block.base, out=out)
    if weight != 1.0:
        out.mul_(weight)

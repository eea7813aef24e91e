"""Which elements of a tensor one model alone changed, and which several did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from search.merge.operator import Inputs


def count_changes(inputs: Inputs, deltas: Sequence[Tensor], epsilon: float) -> Tensor:
    """By how many models each element is changed by more than epsilon, in the dtype of the deltas.

    Zeroes all smaller differences in place. Scratch memory, valid until the next call.
    """
    elements = deltas[0].numel()
    changed = inputs.scratch("changed")[:elements].zero_()
    sign = inputs.scratch("sign")[:elements]
    for delta in deltas:
        torch.hardshrink(delta, epsilon, out=delta)
        changed.add_(torch.sign(delta, out=sign).abs_())
    return changed

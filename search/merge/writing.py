"""Writing into tensors that others own: views with any strides, counted by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often the tensor's memory was written through torch; tensors of inference mode do not say."""
    return -1 if tensor.is_inference() else int(tensor._version)


def count_write(tensor: Tensor) -> None:
    """Let torch know that the tensor's memory was written by others than torch."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def write_range(target: Tensor, start: int, values: Tensor) -> None:
    """Write `values` into a tensor of any strides, from flat (row-major) position `start` on."""
    if target.is_contiguous():
        target.view(-1)[start : start + values.numel()].copy_(values)
        return
    row = target[0].numel()
    while values.numel():
        index, inside = divmod(start, row)
        rows = 0 if inside else values.numel() // row
        if rows:
            count = rows * row
            target[index : index + rows].copy_(values[:count].view(rows, *target.shape[1:]))
        else:  # part of a row: the same one dimension down
            count = min(row - inside, values.numel())
            write_range(target[index], inside, values[:count])
        start, values = start + count, values[count:]

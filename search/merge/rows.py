"""Sums over tensors, rows and columns whose bits depend on the shape alone, and the dtypes they go with.

Float64 sums, rounded afterwards, depend neither on threads nor on the device. Where a recipe asks for the numbers
of mergekit (`compute: inputs`), whole tensors are summed as torch does it in their dtype, on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from search.merge.inputs import row_sums
from search.merge.narrow import NARROW
from search.merge.operator import Block, Inputs
from search.torch_threads import one_thread

CHUNK_ELEMENTS = 1 << 18
"""Elements of a tensor handled at once where rows have to stay whole."""


PIECE_ELEMENTS = 1 << 16
"""Elements of several vectors handled at once."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What torch computes in for tensors of `dtype`: float32 for 16-bit types, else the type itself."""
    return torch.float32 if dtype in NARROW else dtype


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as `dtype` has it."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def task_vectors(inputs: Inputs, block: Block) -> list[Tensor]:
    """The sources of a block, minus the base where there is one. Valid until the next call."""
    if block.base is None:
        return list(block.sources)
    elements = block.stop - block.start
    found = []
    for index, values in enumerate(block.sources):
        delta = inputs.scratch(f"task vector {index}")[:elements]
        found.append(torch.sub(values, block.base, out=delta))
    return found


def whole_task_vector(inputs: Inputs, index: int) -> Tensor:
    """One source as a flat tensor, minus the base where there is one."""
    values = inputs.whole(index).reshape(-1)
    return values if inputs.base is None else values - inputs.whole(None).reshape(-1)


def pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of flat tensors of one length that stay in the processor's cache from one operation to the next."""
    return zip(*(vector.split(PIECE_ELEMENTS) for vector in vectors), strict=True)


def total(values: Tensor) -> float:
    """The sum of all elements, correctly rounded from sums of rows of 1024."""
    return math.fsum(row_sums(values.reshape(-1)))


def torch_sum(values: Tensor, dim: int = -1) -> Tensor:
    """The sum along an axis as torch has it, in the dtype of the values."""
    with one_thread():
        return values.sum(dim)


def torch_norm(values: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean norm along an axis as torch has it, in the dtype of the values."""
    with one_thread():
        length: Tensor = values.norm(dim=dim)
    return length


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with about `CHUNK_ELEMENTS` elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def row_totals(values: Tensor) -> Tensor:
    """(rows,) float64: the sum of each row of a matrix."""
    # torch splits the sum of a single row between threads.
    if values.shape[0] == 1:
        return torch.tensor([total(values)], dtype=torch.float64, device=values.device)
    return values.sum(1, dtype=torch.float64)


def column_totals(values: Tensor) -> Tensor:
    """(columns,) float64: the sum of each column of a matrix, halves added until one row is left."""
    sums = values.double()
    while sums.shape[0] > 1:
        half = sums.shape[0] // 2
        rest = sums[2 * half :]
        sums = torch.cat((sums[:half] + sums[half : 2 * half], rest))
    return sums[0]


def as_matrix(shape: Sequence[int], *, by_last: bool) -> tuple[int, int]:
    """(rows, columns) of a tensor cut before its last axis, or else after its first one."""
    if not shape:
        return 1, 1
    at = len(shape) - 1 if by_last else 1
    return math.prod(shape[:at]), math.prod(shape[at:])

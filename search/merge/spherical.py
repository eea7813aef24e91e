"""Angles and means on the sphere: dot products of the sources, and what methods make of them.

Directions are linear combinations of the sources, whose coefficients follow from the dot products alone: a merge
is then one pass. With `compute: inputs` they are made of whole tensors instead, step by step as mergekit makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from search.merge.inputs import row_sums
from search.merge.operator import Apply, Block, Inputs
from search.merge.rows import task_vectors, wide
from search.merge.task_vectors import keep_all, sum_task_vectors
from search.merge.weighted_sums import WeightedSum
from search.torch_threads import one_thread

SAME_DIRECTION = 1e-16
"""Vectors are colinear, antipodal ones too, where 1 - cosine^2 is not above this."""


def dot_products(inputs: Inputs) -> Tensor:
    """(n, n) float64: the dot products of the sources, or of their differences from the base if there is one."""
    count = len(inputs.models)
    sums: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(count) for j in range(i + 1)}
    for block in inputs.blocks():
        elements = block.stop - block.start
        vectors = [
            inputs.scratch(f"double {index}", torch.float64)[:elements].copy_(values)
            for index, values in enumerate(task_vectors(inputs, block))
        ]
        product = inputs.scratch("product", torch.float64)[:elements]
        for (i, j), rows in sums.items():
            rows.extend(row_sums(torch.mul(vectors[i], vectors[j], out=product)))
    gram = torch.zeros(count, count, dtype=torch.float64)
    for (i, j), rows in sums.items():
        gram[i, j] = gram[j, i] = math.fsum(rows)
    return gram


def combine(inputs: Inputs, coefficients: Sequence[float]) -> Apply:
    """sum_i c_i y_i, plus the base where there is one, with y_i the sources or their differences from it."""

    factors = tuple(coefficients)
    if inputs.base is None:
        return WeightedSum(inputs, factors, None, fused=False)
    weights = [{"weight": factor} for factor in factors]
    plain = {"normalize": False, "lambda": 1.0}
    return sum_task_vectors(inputs, weights, plain, [keep_all] * len(factors), factors)


def copy_result(result: Tensor) -> Apply:
    """For methods that merge whole tensors: hands out what was merged, block by block."""
    flat = result.reshape(-1)

    def apply(block: Block, out: Tensor) -> None:
        out.copy_(flat[block.start : block.stop])

    return apply


def arc(cosine: Tensor, t: float, compute: Literal["float32", "inputs"]) -> tuple[Tensor, Tensor, Tensor]:
    """sin((1-t) th), sin(t th) and sin th for each cosine; 1-t, t and 1 where the vectors are colinear.

    Rounded to the dtype of the cosines at every step, and then given in what torch computes in.

    Args:
        compute: of the inputs; `inputs` takes torch's functions as they are.
    """

    def exactly(function: str, values: Tensor) -> Tensor:
        # In float64, because the functions of float32 may depend on where a value stands in the tensor.
        with one_thread():
            wider = values if compute == "inputs" else values.double()
            result: Tensor = getattr(torch, function)(wider).to(values.dtype)
        return result

    dtype = wide(cosine.dtype)
    cosine = cosine.clamp(-1.0, 1.0)
    # In float64 the cosine of antipodal vectors is exact to a few units only.
    limit = max(SAME_DIRECTION, 8 * torch.finfo(torch.float64).eps) if dtype == torch.float64 else SAME_DIRECTION
    colinear = 1.0 - cosine * cosine <= limit
    angle = exactly("acos", cosine)
    sines = [exactly("sin", (1.0 - t) * angle), exactly("sin", t * angle), exactly("sin", angle)]
    first, second, divisor = (
        torch.where(colinear, torch.full((), value, dtype=dtype, device=cosine.device), sine.to(dtype))
        for sine, value in zip(sines, (1.0 - t, t, 1.0), strict=True)
    )
    return first, second, divisor

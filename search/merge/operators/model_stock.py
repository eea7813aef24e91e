"""Model Stock: the mean of the models, moved towards the base as far as they disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

TINY_PRODUCT = 1e-6
"""Dot products are divided by a product of norms of at least this."""

TINY_DENOMINATOR = 1e-6
"""Where 1 + (n - 1) c is smaller in magnitude, t is 0."""


class ModelStock(Operator):
    """t mean(x_i) + (1 - t) base with t = n c / (1 + (n - 1) c).

    c is the mean over all pairs of the cosine between d_i and d_j; t is not clamped: task vectors that point away
    from each other (c < 0) extrapolate. With `filter_wise` every vector along the last axis has its own t.
    `prepare` finds c for the whole tensor (`cosine`).
    """

    help = "mean of the models, moved towards the base by the angles between task vectors"
    source = "Jang 2024, Model Stock, https://arxiv.org/abs/2403.19522"
    parameters: ClassVar = (
        Parameter("filter_wise", "shared", "bool", False, "one ratio for every vector along the last axis"),
    )
    needs_base = True
    min_sources = 2
    prepares = "all_sources"
    preparation_optional = True
    prepared_version = 2

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.inputs import row_sums
        from search.merge.rows import task_vectors, torch_norm, torch_sum, whole_task_vector

        if inputs.compute == "inputs":
            whole = [whole_task_vector(inputs, index) for index in range(len(inputs.models))]
            lengths = torch.stack([torch_norm(delta) for delta in whole])
            products = torch.stack([torch_sum(whole[i] * whole[j]) for i, j in _pairs(inputs)])
            return {"cosine": _cosine(products, lengths, _pairs(inputs), inputs.compute).cpu()}
        pairs: dict[tuple[int, int], list[float]] = {pair: [] for pair in _pairs(inputs)}
        squares: list[list[float]] = [[] for _ in inputs.models]
        for block in inputs.blocks():
            elements = block.stop - block.start
            deltas = task_vectors(inputs, block)
            product = inputs.scratch("product")[:elements]
            for (i, j), rows in pairs.items():
                rows.extend(row_sums(torch.mul(deltas[i], deltas[j], out=product)))
            double = inputs.scratch("double", torch.float64)[:elements]
            for rows, delta in zip(squares, deltas, strict=True):
                rows.extend(row_sums(double.copy_(delta).square_()))
        norms = torch.tensor([math.sqrt(math.fsum(rows)) for rows in squares], dtype=torch.float64)
        dots = torch.tensor([math.fsum(rows) for rows in pairs.values()], dtype=torch.float64)
        return {"cosine": _cosine(dots.to(inputs.dtype), norms.to(inputs.dtype), list(pairs), inputs.compute)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.spherical import copy_result

        if shared["filter_wise"]:
            return copy_result(_by_rows(inputs))
        share = _ratio((prepared[0] or self.prepare(inputs))["cosine"], len(inputs.models)).to(inputs.device)
        rest = 1.0 - share
        count = torch.tensor(float(len(inputs.models)), dtype=inputs.dtype, device=inputs.device)

        def apply(block: Block, out: Tensor) -> None:
            assert block.base is not None
            term = inputs.scratch("term")[: out.numel()]
            _mean(block.sources, count, out).mul_(share)
            out.add_(torch.mul(block.base, rest, out=term))

        return apply


def _pairs(inputs: Inputs) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(inputs.models)), 2))


def _mean(values: Sequence[Tensor], count: Tensor, out: Tensor) -> Tensor:
    out.copy_(values[0])
    for other in values[1:]:
        out.add_(other)
    return out.div_(count)


def _cosine(
    dots: Tensor, norms: Tensor, pairs: Sequence[tuple[int, int]], compute: Literal["float32", "inputs"]
) -> Tensor:
    """The mean cosine, rounded at every step to the dtype of `dots` (pairs, ...) and `norms` (models, ...)."""
    from search.torch_threads import one_thread

    first, second = (norms[[pair[index] for pair in pairs]] for index in range(2))
    cosines = (dots / (first * second).clamp_min_(TINY_PRODUCT)).clamp_(-1.0, 1.0)
    with one_thread():
        return cosines.mean(0) if compute == "inputs" else cosines.double().mean(0).to(dots.dtype)


def _ratio(cosine: Tensor, count: int) -> Tensor:
    import torch

    denominator = 1.0 + (count - 1) * cosine
    vanishes = denominator.abs() < TINY_DENOMINATOR
    one, none = torch.ones_like(denominator), torch.zeros_like(denominator)
    return torch.where(vanishes, none, count * cosine / torch.where(vanishes, one, denominator))


def _by_rows(inputs: Inputs) -> Tensor:
    """The merged tensor, flat, with a ratio of its own for every vector along the last axis."""
    import torch

    from search.merge.rows import as_matrix, row_chunks

    rows, columns = as_matrix(inputs.shape, by_last=True)
    sources = [inputs.whole(index).reshape(rows, columns) for index in range(len(inputs.models))]
    base, pairs = inputs.whole(None).reshape(rows, columns), _pairs(inputs)
    count = torch.tensor(float(len(sources)), dtype=inputs.dtype, device=inputs.device)
    result = torch.empty_like(base)
    for chunk in row_chunks(rows, columns):
        deltas = [source[chunk] - base[chunk] for source in sources]
        norms = torch.stack([_row_norms(delta, inputs.compute) for delta in deltas])
        dots = torch.stack([_row_sums(deltas[i] * deltas[j], inputs.compute) for i, j in pairs])
        share = _ratio(_cosine(dots, norms, pairs, inputs.compute), len(sources)).unsqueeze(1)
        mean = _mean([source[chunk] for source in sources], count, result[chunk])
        mean.mul_(share).add_((1.0 - share) * base[chunk])
    return result


# Rows are summed as torch sums them: where task vectors point away from each other, the ratio makes much of
# the last bits, and these are then mergekit's. But the sum of a single row is in float64, if not for mergekit.


def _row_sums(values: Tensor, compute: Literal["float32", "inputs"]) -> Tensor:
    from search.merge.rows import row_totals, torch_sum

    if values.shape[0] == 1 and compute == "float32":
        return row_totals(values).to(values.dtype)
    return torch_sum(values)


def _row_norms(values: Tensor, compute: Literal["float32", "inputs"]) -> Tensor:
    from search.merge.rows import row_totals, torch_norm

    if values.shape[0] == 1 and compute == "float32":
        return row_totals(values.double().square_()).sqrt_().to(values.dtype)
    return torch_norm(values)


PLUGIN = ModelStock()

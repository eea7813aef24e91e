"""NuSLERP: spherical interpolation of two models or of their task vectors, whole or row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

TINY_NORM = 1e-7
"""Vectors are divided by at least this."""

TINY_WEIGHT = 1e-6
"""Weights whose sum is smaller mean the middle."""


class NuSlerp(Operator):
    """(sin((1-t) th) y_1 + sin(t th) y_2) / sin th with t = w_2 / (w_1 + w_2), and linear where colinear.

    y_i are the models, or with `task_vectors` their differences from the base, to which the result is
    added. The angle th is that of the whole tensors; with `nuslerp_flatten` off one for every vector along the
    last axis, or along the first axis if `nuslerp_row_wise` (the names are those of mergekit).
    `prepare` finds the `cosine` of the whole tensors.
    """

    help = "spherical interpolation between two models or task vectors, by weights, whole or row by row"
    source = "Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the model", search=(0.0, 1.0, 0.5)),
        Parameter("nuslerp_flatten", "shared", "bool", True, "one angle for the whole tensor"),
        Parameter("nuslerp_row_wise", "shared", "bool", False, "angles along the first axis, else along the last"),
        Parameter("task_vectors", "shared", "bool", False, "interpolate the differences from the base"),
    )
    needs_base = False
    min_sources = 2
    max_sources = 2
    prepares = "all_sources"
    preparation_optional = True
    prepared_version = 2

    def uses_base(self, shared: Mapping[str, Any]) -> bool:
        return bool(shared["task_vectors"])

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.rows import whole_task_vector
        from search.merge.spherical import dot_products

        if inputs.compute == "inputs":
            return {"cosine": _torch_cosines(whole_task_vector(inputs, 0), whole_task_vector(inputs, 1), -1).cpu()}
        dots = dot_products(inputs)
        norms = [max(math.sqrt(float(dots[index, index])), TINY_NORM) for index in range(2)]
        return {"cosine": (dots[0, 1] / norms[0] / norms[1]).to(inputs.dtype)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.rows import task_vectors
        from search.merge.spherical import arc, copy_result

        first, second = (float(values["weight"]) for values in per_source)
        t = 0.5 if abs(first + second) < TINY_WEIGHT else second / (first + second)
        if not shared["nuslerp_flatten"]:
            return copy_result(_by_rows(inputs, t, by_last=not shared["nuslerp_row_wise"]))
        start, end, divisor = arc((prepared[0] or self.prepare(inputs))["cosine"], t, inputs.compute)
        factors, divisor = (float(start), float(end)), divisor.to(inputs.device, inputs.dtype)

        def apply(block: Block, out: Tensor) -> None:
            vectors = task_vectors(inputs, block)
            term = inputs.scratch("term")[: out.numel()]
            torch.mul(vectors[0], factors[0], out=out)
            out.add_(torch.mul(vectors[1], factors[1], out=term))
            out.div_(divisor)
            if block.base is not None:
                out.add_(block.base)

        return apply


def _by_rows(inputs: Inputs, t: float, *, by_last: bool) -> Tensor:
    """The merged tensor, flat, with one angle for every vector along the last or else the first axis."""
    import torch

    from search.merge.rows import as_matrix, row_chunks
    from search.merge.spherical import arc

    rows, columns = as_matrix(inputs.shape, by_last=by_last)
    key = ("nuslerp", by_last, inputs.name, inputs.models, inputs.base, inputs.dtype)
    first, second, base = _matrices(inputs, rows, columns)
    if key not in inputs.cache:
        if inputs.compute == "inputs":
            found = _torch_cosines(*_vectors(first, second, base, slice(None)), 1 if by_last else 0)
        else:
            found = _cosines(first, second, base, by_last=by_last)
        inputs.cache[key] = found.cpu()
    cosines = inputs.cache[key].to(inputs.device)
    start, end, divisor = (factor.unsqueeze(1 if by_last else 0) for factor in arc(cosines, t, inputs.compute))
    dtype = inputs.dtype
    result = torch.empty(rows, columns, dtype=dtype, device=inputs.device)
    for chunk in row_chunks(rows, columns):
        at = chunk if by_last else slice(None)
        y_1, y_2 = _vectors(first, second, base, chunk)
        merged = (y_1 * start[at]).to(dtype).add_((y_2 * end[at]).to(dtype))
        merged = (merged / divisor[at]).to(dtype)
        result[chunk] = merged if base is None else merged + base[chunk]
    return result


def _matrices(inputs: Inputs, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    first, second = (inputs.whole(index).reshape(rows, columns) for index in range(2))
    return first, second, None if inputs.base is None else inputs.whole(None).reshape(rows, columns)


def _vectors(first: Tensor, second: Tensor, base: Tensor | None, chunk: slice) -> tuple[Tensor, Tensor]:
    if base is None:
        return first[chunk], second[chunk]
    return first[chunk] - base[chunk], second[chunk] - base[chunk]


def _torch_cosines(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """The cosines along an axis, as torch sums them in the dtype of the vectors."""
    from search.merge.rows import torch_norm, torch_sum

    units = [values / torch_norm(values, dim).clamp_min_(TINY_NORM).unsqueeze(dim) for values in (first, second)]
    return torch_sum(units[0].mul_(units[1]), dim)


def _cosines(first: Tensor, second: Tensor, base: Tensor | None, *, by_last: bool) -> Tensor:
    """(rows,) or (columns,): cosines of the two vectors along the last or else the first axis."""
    import torch

    from search.merge.rows import column_totals, row_chunks, row_totals

    totals, across = (row_totals, 1) if by_last else (column_totals, 0)
    chunks = list(row_chunks(*first.shape))
    if not chunks:
        return torch.zeros(first.shape[1 - across], dtype=first.dtype, device=first.device)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        return (_vectors(first, second, base, chunk) for chunk in chunks)

    squares = [[totals(values.double().square_()) for values in pair] for pair in pairs()]
    if not by_last:  # columns go through all chunks
        squares = [[torch.stack(sums).sum(0) for sums in zip(*squares, strict=True)]] * len(chunks)
    parts = []
    for pair, sums in zip(pairs(), squares, strict=True):
        norms = [square.sqrt().clamp_min_(TINY_NORM).unsqueeze(across) for square in sums]
        parts.append(totals(pair[0].double() / norms[0] * (pair[1].double() / norms[1])))
    cosines = torch.cat(parts) if by_last else torch.stack(parts).sum(0)
    return cosines.to(first.dtype)


PLUGIN = NuSlerp()

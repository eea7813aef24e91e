"""Spherical interpolation between two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

COLINEAR = 0.9995
"""Beyond this abs(cosine), antipodal vectors included, the interpolation is linear."""

TINY_NORM = 1e-8
"""Vectors up to this norm are not divided by it."""


class Slerp(Operator):
    """sin((1-t) th)/sin th * a + sin(t th)/sin th * v with the angle th between the whole tensors a and v.

    The first source is a (t = 0), the second v (t = 1). Linear in both once the angle is known, which
    `prepare` finds: `dot`, and the squared norms `first` and `second`, all summed in float64; with
    `compute: inputs` the `cosine`, summed as torch does it in float32.
    """

    help = "spherical interpolation between two models"
    source = "Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242"
    parameters: ClassVar = (
        Parameter("t", "shared", "float", None, "0: the first source, 1: the second", search=(0.0, 1.0, 0.5)),
    )
    needs_base = False
    min_sources = 2
    max_sources = 2
    prepares = "all_sources"
    prepared_version = 2

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.inputs import row_sums

        if inputs.compute == "inputs":
            return {"cosine": _cosine(inputs)}
        sums: dict[str, list[float]] = {"dot": [], "first": [], "second": []}
        for block in inputs.blocks():
            elements = block.stop - block.start
            first = inputs.scratch("first", torch.float64)[:elements].copy_(block.sources[0])
            second = inputs.scratch("second", torch.float64)[:elements].copy_(block.sources[1])
            product = inputs.scratch("product", torch.float64)[:elements]
            sums["dot"] += row_sums(torch.mul(first, second, out=product))
            sums["first"] += row_sums(first.square_())
            sums["second"] += row_sums(second.square_())
        return {name: torch.tensor(math.fsum(rows), dtype=torch.float64) for name, rows in sums.items()}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.weighted_sums import WeightedSum

        t = float(shared["t"])
        if inputs.compute == "inputs":
            factors = _rounded_coefficients(t, prepared[0]["cosine"])
        else:
            dot, first, second = (float(prepared[0][name]) for name in ("dot", "first", "second"))
            factors = coefficients(t, dot, math.sqrt(first), math.sqrt(second))
        return WeightedSum(inputs, factors, None, fused=False)


def coefficients(t: float, dot: float, norm_first: float, norm_second: float) -> tuple[float, float]:
    """Factors of the two unnormalised vectors at t, from their dot product and their norms."""
    unit = [norm if norm > TINY_NORM else 1.0 for norm in (norm_first, norm_second)]
    cosine = dot / unit[0] / unit[1]
    if not abs(cosine) <= COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _cosine(inputs: Inputs) -> Tensor:
    """That of the whole tensors, in what torch computes in for their dtype."""
    from search.merge.rows import torch_norm, torch_sum, wide

    units = []
    for index in range(2):
        values = inputs.whole(index).reshape(-1).to(wide(inputs.dtype))
        norm = torch_norm(values)
        units.append(values / norm if norm > TINY_NORM else values)
    return torch_sum(units[0] * units[1]).cpu()


def _rounded_coefficients(t: float, cosine: Tensor) -> tuple[float, float]:
    """`coefficients`, rounded at every step to the dtype of the cosine."""
    from search.merge.spherical import arc

    if not abs(float(cosine)) <= COLINEAR:
        return 1.0 - t, t
    start, end, divisor = arc(cosine, t, "inputs")
    return float(start / divisor), float(end / divisor)


PLUGIN = Slerp()

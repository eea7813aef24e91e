"""Spherical interpolation between two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

COLINEAR = 0.9995
"""Beyond this abs(cosine), antipodal vectors included, the interpolation is linear."""

TINY_NORM = 1e-8
"""Vectors up to this norm are not divided by it."""


class Slerp(Operator):
    """sin((1-t) th)/sin th * a + sin(t th)/sin th * v with the angle th between the whole tensors a and v.

    The first source is a (t = 0), the second v (t = 1). Linear in both once the angle is known, which
    `prepare` finds: `dot`, and the squared norms `first` and `second`, all summed in float64.
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

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.inputs import row_sums

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
        import torch

        dot, first, second = (float(prepared[0][name]) for name in ("dot", "first", "second"))
        start, end = coefficients(float(shared["t"]), dot, math.sqrt(first), math.sqrt(second))

        def apply(block: Block, out: Tensor) -> None:
            step = inputs.scratch("delta")[: out.numel()]
            torch.mul(block.sources[0], start, out=out)
            out.add_(torch.mul(block.sources[1], end, out=step))

        return apply


def coefficients(t: float, dot: float, norm_first: float, norm_second: float) -> tuple[float, float]:
    """Factors of the two unnormalised vectors at t, from their dot product and their norms."""
    unit = [norm if norm > TINY_NORM else 1.0 for norm in (norm_first, norm_second)]
    cosine = dot / unit[0] / unit[1]
    if not abs(cosine) <= COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


PLUGIN = Slerp()

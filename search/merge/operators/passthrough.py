"""One model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Operator):
    """x * scale; with scale 1 the tensor itself, bit for bit."""

    help = "one model as it is, or scaled"
    source = "Kim 2023, SOLAR 10.7B: depth up-scaling, https://arxiv.org/abs/2312.15166"
    parameters: ClassVar = (Parameter("scale", "source", "float", 1.0, "factor of the tensor"),)
    needs_base = False
    max_sources = 1

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.weighted_sums import WeightedSum

        return WeightedSum(inputs, (float(per_source[0]["scale"]),), None, fused=False)


PLUGIN = Passthrough()

"""Weighted averages of models: soups, and any other linear combination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Operator):
    """sum_i w_i x_i, over sum_i w_i if `normalize` (Wortsman 2022, https://arxiv.org/abs/2203.05482).

    Products are added by fused multiply-add in the order of the sources. With `normalize`, weights that
    sum to 0 are refused.
    """

    help = "weighted average of the models (soup)"
    source = "Wortsman 2022, Model soups, https://arxiv.org/abs/2203.05482"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the model", search=(0.0, 1.0, 0.5)),
        Parameter("normalize", "shared", "bool", True, "divide by the sum of the weights"),
    )
    needs_base = False

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        from search.merge.parameter_faults import zero_sum_fault

        return zero_sum_fault(per_source) if shared["normalize"] else None

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.inputs import sum_of_weights
        from search.merge.weighted_sums import WeightedSum

        weights = tuple(float(values["weight"]) for values in per_source)
        total = sum_of_weights(weights, torch.float64 if inputs.dtype == torch.float64 else torch.float32)
        return WeightedSum(inputs, weights, total if shared["normalize"] else None, fused=True)


PLUGIN = Linear()

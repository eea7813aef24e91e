"""Weighted averages of models: soups, and any other linear combination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Operator):
    """sum_i w_i x_i, over sum_i w_i if `normalize` (Wortsman 2022, https://arxiv.org/abs/2203.05482).

    Products are added by fused multiply-add in the order of the sources. Weights that sum to 0 with
    `normalize` on give tensors that are not finite.
    """

    help = "weighted average of the models (soup)"
    source = "Wortsman 2022, Model soups, https://arxiv.org/abs/2203.05482"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the model", search=(0.0, 1.0, 0.5)),
        Parameter("normalize", "shared", "bool", True, "divide by the sum of the weights"),
    )
    needs_base = False

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.inputs import sum_of_weights

        weights = [float(values["weight"]) for values in per_source]
        normalize = bool(shared["normalize"])
        # A tensor, because CUDA divides by a Python number with its rounded reciprocal.
        total = torch.tensor(sum_of_weights(weights, inputs.dtype), dtype=inputs.dtype, device=inputs.device)

        def apply(block: Block, out: Tensor) -> None:
            torch.mul(block.sources[0], weights[0], out=out)
            for values, weight in zip(block.sources[1:], weights[1:], strict=True):
                out.add_(values, alpha=weight)
            if normalize:
                out.div_(total)

        return apply


PLUGIN = Linear()

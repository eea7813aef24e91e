"""LiNeS: task arithmetic whose scale grows with the depth of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.grouping import place_of
from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Lines(Operator):
    """base + (alpha / T + beta * depth) * sum_i w_i d_i over T sources (Wang 2025).

    The depth is 0 in the first layer and 1 in the last. Embeddings stand at 0; what else is outside of the layers,
    such as the last norm and the head, at 1. The paper gives all of them the scale of the first layer, and gives
    the first layer 1 / T, as alpha = 1 does; its beta is chosen by validation. For one source, alpha + beta = 1
    keeps the last layer as it was fine-tuned (the paper's use against forgetting).
    """

    help = "summed task vectors, scaled up linearly from the first layer to the last"
    source = "Wang 2025, LiNeS, https://arxiv.org/abs/2410.17146"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the task vector in the sum"),
        Parameter(
            "alpha",
            "shared",
            "float",
            1.0,
            "scale in the first layer, times the number of sources",
            search=(0.0, 2.0, 1.0),
        ),
        Parameter(
            "beta", "shared", "float", 0.2, "how much larger the scale is in the last layer", search=(0.0, 1.0, 0.2)
        ),
    )
    needs_base = True

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        weights = [float(values["weight"]) for values in per_source]
        scale = float(shared["alpha"]) / len(weights) + float(shared["beta"]) * _depth(inputs)

        def apply(block: Block, out: Tensor) -> None:
            delta = inputs.scratch("delta")[: out.numel()]
            for index, (source, weight) in enumerate(zip(block.sources, weights, strict=True)):
                target = delta if index else out
                torch.sub(source, block.base, out=target)
                target.mul_(weight * scale)
                if index:
                    out.add_(delta)
            out.add_(block.base)

        return apply


def _depth(inputs: Inputs) -> float:
    if inputs.depth is not None:
        return inputs.depth
    return 0.0 if place_of(inputs.name).kind == "embedding" else 1.0


PLUGIN = Lines()

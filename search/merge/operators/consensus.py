"""Consensus merging: of the summed task vectors only what several tasks use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Consensus(Operator):
    """base + lambda * c m with m = sum_i w_i d_i; c is 1 where at least k TALL masks are, else 0 (Wang 2024).

    k = 0 keeps all (task arithmetic), 1 drops what no task uses, 2 also what only one uses; with k above the number
    of sources the base is left. The paper tunes lambda on held-out items.
    """

    help = "sum of the task vectors where several tasks use it"
    source = "Wang 2024, Localizing Task Information, https://arxiv.org/abs/2405.07813"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the task vector in the sum"),
        Parameter("threshold", "source", "float", 0.4, "how far others may move an element that a task uses", 0.0),
        Parameter("k", "shared", "int", 2, "how many tasks must use an element", 0),
        Parameter("lambda", "shared", "float", 0.4, "factor of the merged task vector", search=(0.0, 1.5, 0.4)),
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

        from search.merge.tall_masks import multi_task_vector, tall_mask

        weights = [float(values["weight"]) for values in per_source]
        thresholds = [float(values["threshold"]) for values in per_source]
        scale, least = float(shared["lambda"]), float(shared["k"])

        def apply(block: Block, out: Tensor) -> None:
            count = inputs.scratch("count")[: out.numel()].zero_()
            multi_task_vector(inputs, block, weights, out)
            for index, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
                count.add_(tall_mask(inputs, block, index, weight, threshold, out))
            out.mul_(torch.ge(count, least, out=count)).mul_(scale).add_(block.base)

        return apply


PLUGIN = Consensus()

"""Fisher-weighted averaging: every element goes with the model that is surest of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Parameter
from search.merge.statistics_operator import StatisticsOperator

if TYPE_CHECKING:
    from torch import Tensor


LEAST_FLOOR = 1e-20
"""Stands for floors below it, so that elements without any information are averaged, not divided by zero."""


class Fisher(StatisticsOperator):
    """x = sum_i w_i F_i x_i / sum_i w_i F_i per element, F_i the diagonal Fisher information (Matena 2022).

    F_i is floored at `floor` times the mean of the F_j over the tensor and the sources, so that elements that no
    model's items touch are averaged plainly. So is, with the weights w_i, every tensor that lacks statistics for
    one of the sources: buffers, and tensors that the model does not use. lambda other than 1 takes the base too:
    base + lambda (x - base). The F_i are compared as they are: a model with larger gradients counts more, which
    the weights can undo.

    Raises:
        RecipeError: statistics do not have the shape of the tensor.
    """

    help = "average weighted by Fisher information, per element"
    source = "Matena 2022, Merging Models with Fisher-Weighted Averaging, https://arxiv.org/abs/2111.09832"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the model's Fisher information", 0.0),
        Parameter("floor", "shared", "float", 1e-6, "least Fisher information, in units of its mean", 0.0),
        StatisticsOperator.LAMBDA,
    )
    statistics = "fisher"
    prepares = "each_source"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """The sum of the source's Fisher information over the tensor, in float64."""
        import math

        import torch

        from search.merge.inputs import row_sums
        from search.merge.statistics import statistic_of

        found = statistic_of(inputs, "fisher", 0, inputs.shape)
        if found is None:
            return {}
        flat, rows = found.reshape(-1), 1 << 20
        sums = [part for start in range(0, len(flat), rows) for part in row_sums(flat[start : start + rows])]
        return {"sum": torch.tensor(math.fsum(sums), dtype=torch.float64)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.averages import plain_average, scale_from_base
        from search.merge.statistics import statistic_of

        weights, scale = [float(values["weight"]) for values in per_source], float(shared["lambda"])
        found = [statistic_of(inputs, "fisher", index, inputs.shape) for index in range(len(weights))]
        known = [one.reshape(-1) for one in found if one is not None]
        mean = sum(float(part["sum"]) for part in prepared if part) / max(1, inputs.numel * len(weights))
        if len(known) < len(weights) or not mean > 0.0:
            return plain_average(inputs, weights, scale)
        floor = max(LEAST_FLOOR, float(shared["floor"]))

        def apply(block: Block, out: Tensor) -> None:
            share, whole, term = (inputs.scratch(name)[: out.numel()] for name in ("share", "whole", "delta"))
            whole.zero_()
            for index, (source, weight) in enumerate(zip(block.sources, weights, strict=True)):
                # In units of the mean: those of a large model are too small for float32 otherwise.
                share.copy_(known[index][block.start : block.stop]).mul_(1.0 / mean).clamp_min_(floor).mul_(weight)
                whole.add_(share)
                if index:
                    out.add_(torch.mul(share, source, out=term))
                else:
                    torch.mul(share, source, out=out)
            out.div_(whole)
            scale_from_base(out, block, scale)

        return apply


PLUGIN = Fisher()

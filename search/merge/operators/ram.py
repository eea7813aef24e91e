"""RAM: task vectors added where one model alone changed, averaged where several did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Ram(Operator):
    """base + per element the mean of the d_i of models that changed it: those with abs(d_i) > epsilon."""

    help = "task vectors averaged over the models that changed an element"
    source = "Yuan 2026, Behavior knowledge merge in reinforced agentic models, https://arxiv.org/abs/2601.13572"
    parameters: ClassVar = (
        Parameter("epsilon", "shared", "float", 1e-5, "differences up to this count as unchanged", 0.0),
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

        from search.merge.rows import task_vectors, wide
        from search.merge.shared_changes import count_changes

        epsilon = float(shared["epsilon"])

        def apply(block: Block, out: Tensor) -> None:
            deltas = task_vectors(inputs, block)
            changed = count_changes(inputs, deltas, epsilon).clamp_min_(1.0)
            summed = inputs.scratch("sum", wide(inputs.dtype))[: out.numel()].zero_()
            for delta in deltas:  # zero where unchanged
                summed += delta.div_(changed)
            torch.add(summed.to(out.dtype), block.base, out=out)

        return apply


PLUGIN = Ram()

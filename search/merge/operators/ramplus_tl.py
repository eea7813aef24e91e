"""RAM+ (tensor level): what a model alone changed grows with how much it shares with the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class RamPlusTensorLevel(Operator):
    """RAM whose unshared changes are multiplied, per model and tensor, by 1 + r clamp(rho, 0, alpha).

    rho is the number of elements that the model changed together with others over the number that it
    changed alone (at least epsilon). With 16-bit inputs and `compute: inputs`, unshared changes and the sum are
    float32, as in mergekit.
    """

    help = "task vectors averaged where shared, amplified where one model alone changed an element"
    source = "Yuan 2026, Behavior knowledge merge in reinforced agentic models, https://arxiv.org/abs/2601.13572"
    parameters: ClassVar = (
        Parameter("epsilon", "shared", "float", 1e-5, "differences up to this count as unchanged", 0.0),
        Parameter("r", "shared", "float", 0.1, "growth of unshared changes per rho", search=(0.0, 1.0, 0.1)),
        Parameter("alpha", "shared", "float", 0.2, "largest rho that counts", 0.0, search=(0.0, 1.0, 0.2)),
    )
    needs_base = True
    widens = True

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

        epsilon, r, alpha = (float(shared[name]) for name in ("epsilon", "r", "alpha"))
        dtype = wide(inputs.dtype)
        growth = []
        for alone, together in _counts(inputs, epsilon):
            # Where nothing is unshared and epsilon is 0, there is nothing to grow either.
            rho = together / max(alone, epsilon) if alone or epsilon else 0.0
            growth.append(1.0 + r * min(rho, alpha))

        def apply(block: Block, out: Tensor) -> None:
            deltas = task_vectors(inputs, block)
            changed = count_changes(inputs, deltas, epsilon)
            alone, among = changed == 1.0, changed.clamp_min_(1.0)
            summed = inputs.scratch("sum", dtype)[: out.numel()].zero_()
            for delta, factor in zip(deltas, growth, strict=True):
                summed += torch.where(alone, delta.to(dtype) * factor, (delta / among).to(dtype))
            out.copy_(summed.add_(block.base))

        return apply


def _counts(inputs: Inputs, epsilon: float) -> list[tuple[int, int]]:
    """Per source: how many elements it changed alone, and how many together with others."""
    import torch

    from search.merge.rows import task_vectors
    from search.merge.shared_changes import count_changes

    key = ("ramplus_tl", inputs.name, inputs.models, inputs.base, inputs.dtype, epsilon)
    if key not in inputs.cache:
        found = [[0, 0] for _ in inputs.models]
        for block in inputs.blocks():
            deltas = task_vectors(inputs, block)
            changed = count_changes(inputs, deltas, epsilon)
            for counts, delta in zip(found, deltas, strict=True):
                touched = delta != 0.0
                alone = int(torch.count_nonzero(touched & (changed == 1.0)))
                counts[0] += alone
                counts[1] += int(torch.count_nonzero(touched)) - alone
        inputs.cache[key] = [(alone, together) for alone, together in found]
    result: list[tuple[int, int]] = inputs.cache[key]
    return result


PLUGIN = RamPlusTensorLevel()

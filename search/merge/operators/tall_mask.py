"""One task out of the sum of all: the multi-task vector behind the task's TALL mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class TallMask(Operator):
    """base + lambda * c_t m with m = sum_i w_i d_i and c_t the TALL mask of source t (Wang 2024).

    Brings back one fine-tune from what all of them share and one bit per element: a yardstick for how much of a
    task the sum still holds, not a merge of the tasks.
    """

    help = "one task taken back out of the summed task vectors by its mask"
    source = "Wang 2024, Localizing Task Information, https://arxiv.org/abs/2405.07813"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the task vector in the sum"),
        Parameter("task", "shared", "int", 0, "which source to take out, counted from 0 in the recipe's order", 0),
        Parameter(
            "threshold",
            "shared",
            "float",
            0.4,
            "how far others may move an element that the task uses",
            0.0,
            None,
            (0.1, 1.0, 0.4),
        ),
        Parameter("lambda", "shared", "float", 1.0, "factor of the masked sum", search=(0.0, 1.5, 1.0)),
    )
    needs_base = True

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        last = len(per_source) - 1
        if int(shared["task"]) <= last:
            return None
        return f"task is {shared['task']}, expected the number of a source, counted from 0: at most {last}"

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.tall_masks import multi_task_vector, tall_mask

        weights = [float(values["weight"]) for values in per_source]
        task, threshold, scale = int(shared["task"]), float(shared["threshold"]), float(shared["lambda"])

        def apply(block: Block, out: Tensor) -> None:
            multi_task_vector(inputs, block, weights, out)
            out.mul_(tall_mask(inputs, block, task, weights[task], threshold, out)).mul_(scale).add_(block.base)

        return apply


PLUGIN = TallMask()

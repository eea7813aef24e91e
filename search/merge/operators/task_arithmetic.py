"""Task arithmetic: the base plus a weighted sum of the differences from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(Operator):
    """base + lambda * sum_i w_i d_i, over sum_i w_i if `normalize` (unless that sum is below 1e-8)."""

    help = "base plus a weighted sum of task vectors"
    source = "Ilharco 2023, Editing models with task arithmetic, https://arxiv.org/abs/2212.04089"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        Parameter("density", "source", "float", 1.0, "accepted, changes nothing", 0.0, 1.0),
        Parameter("normalize", "shared", "bool", False, "divide by the sum of the weights"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the summed task vectors"),
        Parameter("rescale", "shared", "bool", False, "accepted, changes nothing"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_vectors import keep_all, sum_task_vectors

        weights = [float(values["weight"]) for values in per_source]
        return sum_task_vectors(inputs, per_source, shared, [keep_all] * len(weights), weights)


PLUGIN = TaskArithmetic()

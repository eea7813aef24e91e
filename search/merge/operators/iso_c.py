"""Iso-C: the sum of the task vectors with all singular values alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(Operator):
    """base + lambda * s U V with sum_i d_i = U S V and s the mean of S (Marczak 2025).

    Where the sum has not full rank, mean and product run over its rank. Vectors and embeddings get the mean of
    the task vectors, times lambda.
    """

    help = "summed task vectors with equal singular values"
    source = "Marczak 2025, No Task Left Behind, https://arxiv.org/abs/2502.04959"
    parameters: ClassVar = (
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector", search=(0.0, 2.0, 1.0)),
    )
    needs_base = True
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.task_matrices import factors, finished, is_matrix, isotropic, largest_norm, task_matrices
        from search.torch_threads import one_thread

        if not is_matrix(inputs):
            return {}
        deltas = task_matrices(inputs)
        with one_thread():
            merged = [
                isotropic(factors(sum(tasks[1:], start=tasks[0]), largest_norm(tasks)))
                for tasks in zip(*deltas, strict=True)
            ]
        return {"delta": finished(inputs, merged)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_matrices import add_prepared

        return add_prepared(inputs, prepared, float(shared["lambda"]))


PLUGIN = IsoC()

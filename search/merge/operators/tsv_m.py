"""TSV-M: the main singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class TsvM(Operator):
    """base + lambda * sum_i w_i U'_i S_i V'_i over T sources (Gargiulo 2025).

    d_i = U_i S_i V_i, cut to its rank // T largest singular values, where the rank is that of a full matrix of
    this shape. [U'_1 ... U'_T] is the matrix with orthonormal columns nearest to [U_1 ... U_T] (its polar factor),
    likewise for V. Weights scale the tasks after that, so they and lambda can be searched at the cost of a sum:
    what is prepared is one tensor per source.

    Vectors, embeddings and matrices with fewer rows or columns than there are sources get the mean of the task
    vectors, times lambda. A task vector of zeros takes no part; where those of two tasks point the same way
    exactly, they share the direction instead of being turned apart at random.
    """

    help = "singular vectors of the task vectors, decorrelated between tasks"
    source = "Gargiulo 2025, Task Singular Vectors, https://arxiv.org/abs/2412.00081"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the task, beside lambda"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector", search=(0.0, 2.0, 1.0)),
    )
    needs_base = True
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.task_matrices import factors, finished, is_matrix, nearest_isometry, task_matrices
        from search.torch_threads import one_thread

        tasks = len(inputs.models)
        if not is_matrix(inputs):
            return {}
        deltas = task_matrices(inputs)
        kept = min(deltas[0].shape[1:]) // tasks
        if not kept:
            return {}
        merged: list[list[Tensor]] = [[] for _ in deltas]
        with one_thread():
            for matrices in zip(*deltas, strict=True):
                parts = [factors(matrix).first(kept) for matrix in matrices]
                left = nearest_isometry(torch.cat([part.left for part in parts], 1))
                right = nearest_isometry(torch.cat([part.right for part in parts]))
                start = 0
                for index, part in enumerate(parts):
                    stop = start + len(part.values)
                    merged[index].append(left[:, start:stop] * part.values @ right[start:stop])
                    start = stop
        return {str(index): finished(inputs, found) for index, found in enumerate(merged)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_matrices import add_deltas, add_mean

        scale = float(shared["lambda"])
        weights = [float(values["weight"]) for values in per_source]
        (tasks,) = prepared
        if not tasks:
            return add_mean(inputs, scale, weights)
        scales = [scale * weight for weight in weights]
        return add_deltas(inputs, [tasks[str(index)] for index in range(len(weights))], scales)


PLUGIN = TsvM()

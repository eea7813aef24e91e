"""Iso-CTS: equal singular values over what the tasks share and over what is each task's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

COMMON = 0.8
"""Default share of the directions that belong to the sum of the task vectors, as in the paper."""


class IsoCts(Operator):
    """base + lambda * s U' V', with directions of the sum and of every task (Marczak 2025).

    For matrices with r = min(rows, columns) and T sources: of sum_i d_i = U S V the k first directions; of each
    d_i - U_k U_k^T d_i the (r - k) / T first, k being `common` r rounded so that this is whole. U' and V' are the
    polar factors of all of them side by side, s the mean of their singular values.

    Directions that a task vector of less rank does not have are left out, of mean and product. Vectors and
    embeddings get the mean of the task vectors, times lambda. What is prepared is for `common` = 0.8; any other
    share is decomposed anew whenever it changes, so lambda can be searched, but `common` only at that price.
    """

    help = "equal singular values over common and task-specific directions"
    source = "Marczak 2025, No Task Left Behind, https://arxiv.org/abs/2502.04959"
    parameters: ClassVar = (
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector", search=(0.0, 2.0, 1.0)),
        Parameter("common", "shared", "float", COMMON, "share of the directions that are common", 0.0, 1.0),
    )
    needs_base = True
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.task_matrices import is_matrix

        return {"delta": _merged(inputs, COMMON)} if is_matrix(inputs) else {}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_matrices import add_prepared, is_matrix, latest

        common = float(shared["common"])
        if common != COMMON and is_matrix(inputs):
            prepared = ({"delta": latest(inputs, "iso_cts", common, lambda: _merged(inputs, common))},)
        return add_prepared(inputs, prepared, float(shared["lambda"]))


def _merged(inputs: Inputs, common: float) -> Tensor:
    from search.merge.task_matrices import finished, task_matrices
    from search.torch_threads import one_thread

    with one_thread():
        return finished(inputs, [_isotropic(tasks, common) for tasks in zip(*task_matrices(inputs), strict=True)])


def _isotropic(tasks: Sequence[Tensor], common: float) -> Tensor:
    """The merge of the task matrices (rows, columns) of one layer."""
    import torch

    from search.merge.task_matrices import factors, largest_norm, nearest_isometry

    total = sum(tasks[1:], start=tasks[0])
    least = min(total.shape)
    own = min(least // len(tasks), round((least - int(least * common)) / len(tasks)))
    scale = largest_norm(tasks)
    shared = factors(total, scale).first(least - own * len(tasks))
    parts = [factors(task - shared.left @ (shared.left.T @ task), scale).first(own) for task in tasks]
    parts.append(shared)
    values = torch.cat([part.values for part in parts])
    if not len(values):
        return torch.zeros_like(total)
    left = nearest_isometry(torch.cat([part.left for part in parts], 1))
    right = nearest_isometry(torch.cat([part.right for part in parts]))
    return values.mean() * (left @ right)


PLUGIN = IsoCts()

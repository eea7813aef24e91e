"""WUDI-Merging: the task vector that interferes least with every task, without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6
"""Pull towards the sum of the task vectors, in units of the mean eigenvalue of the summed Gram matrices."""


class Wudi(Operator):
    """base + lambda * d, where d minimises sum_i |(d - d_i) d_i^T|^2 / |d_i|^2 (Cheng 2025).

    The rows of d_i stand for the inputs that the task was trained on, so what this keeps small is the change of
    every task's outputs. The paper takes steps of Adam from sum_i d_i. The minimum has a closed form: with
    G_i = d_i^T d_i / |d_i|^2 (inputs x inputs) and e = 1e-6 times the mean eigenvalue of sum_i G_i,
    d = (sum_i d_i G_i + e sum_i d_i) (sum_i G_i + e)^-1. The ridge e keeps d at the sum in directions that no task
    uses, as steps from there would.

    Matrices of (inputs, outputs), as in GPT-2, are known by their names. Vectors and embeddings get the mean of
    the task vectors, times lambda. A task vector of zeros takes no part.
    """

    help = "task vectors merged so that the outputs of every task change least"
    source = "Cheng 2025, WUDI-Merging, https://arxiv.org/abs/2503.08099"
    parameters: ClassVar = (
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector", search=(0.0, 2.0, 1.0)),
    )
    needs_base = True
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.task_matrices import finished, has_inputs_first, is_matrix, task_matrices
        from search.torch_threads import one_thread

        if not is_matrix(inputs):
            return {}
        deltas = task_matrices(inputs)
        turn = has_inputs_first(inputs.name, inputs.shape)
        with one_thread():
            if turn:
                merged = [_least_interference([d.T for d in tasks]).T for tasks in zip(*deltas, strict=True)]
            else:
                merged = [_least_interference(tasks) for tasks in zip(*deltas, strict=True)]
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


def _least_interference(tasks: Sequence[Tensor]) -> Tensor:
    """The minimum for task matrices (outputs, inputs) of one layer."""
    import torch

    total = sum(tasks[1:], start=tasks[0])
    norms = [float(task.square().sum()) for task in tasks]
    used = [task / norm**0.5 for task, norm in zip(tasks, norms, strict=True) if norm > 0.0]
    if not used:
        return total
    grams = [task.T @ task for task in used]
    summed = sum(grams[1:], start=grams[0])
    ridge = RIDGE * len(used) / len(summed)  # every Gram matrix has the trace 1
    # As a correction of the sum: sum_i (d_i - sum) G_i (sum_i G_i + e)^-1, small where tasks do not meet.
    pull = torch.zeros_like(total)
    kept = [task for task, norm in zip(tasks, norms, strict=True) if norm > 0.0]
    for task, gram in zip(kept, grams, strict=True):
        pull += (task - total) @ gram
    summed.diagonal().add_(ridge)
    return total + torch.cholesky_solve(pull.T, torch.linalg.cholesky(summed)).T


PLUGIN = Wudi()

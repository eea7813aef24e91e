"""RegMean: linear layers whose outputs are closest to those of every model on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Parameter
from search.merge.statistics_operator import StatisticsOperator

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.9
"""Default factor of what stands off the diagonals, as in the paper."""

RIDGE = 1e-6
"""Added to every Gram matrix, in units of the mean of their diagonals: directions that no input has shown are
averaged plainly."""


class RegMean(StatisticsOperator):
    """W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i, the least squares of x W - x W_i (Jin 2023).

    W is (inputs, outputs) and G_i (inputs, inputs) the mean of x x^T over the inputs x of this layer in model i,
    its elements off the diagonal times `alpha`, plus 1e-6 of the mean diagonal. Tensors that lack a Gram matrix
    for one of the sources are averaged plainly, with the weights: embeddings (and heads tied to them), norms,
    biases, and layers that no item reached. lambda other than 1 takes the base too: base + lambda (W - base).

    What is prepared is for equal weights and `alpha` = 0.9; other values are solved anew whenever they change, so
    lambda can be searched, and these only at that price.

    Raises:
        RecipeError: statistics do not have the shape of the tensor.
    """

    help = "linear layers by least squares over the inputs of every model"
    source = (
        "Jin 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, https://arxiv.org/abs/2212.09849"
    )
    parameters: ClassVar = (
        Parameter("weight", "source", "float", 1.0, "factor of the model's Gram matrices", 0.0),
        Parameter(
            "alpha", "shared", "float", ALPHA, "factor of what is off the diagonal of the Gram matrices", 0.0, 1.0
        ),
        StatisticsOperator.LAMBDA,
    )
    statistics = "gram"
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        grams = _grams(inputs)
        return {"merged": _solve(inputs, grams, [1.0] * len(grams), ALPHA)} if grams else {}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.averages import plain_average, scale_from_base
        from search.merge.task_matrices import latest

        weights, scale = [float(values["weight"]) for values in per_source], float(shared["lambda"])
        alpha = float(shared["alpha"])
        (known,) = prepared
        if not known:
            return plain_average(inputs, weights, scale)
        merged = known["merged"]
        if alpha != ALPHA or len(set(weights)) > 1:
            merged = latest(
                inputs, "regmean", (alpha, *weights), lambda: _solve(inputs, _grams(inputs), weights, alpha)
            )
        flat = merged.reshape(-1)

        def apply(block: Block, out: Tensor) -> None:
            out.copy_(flat[block.start : block.stop])
            scale_from_base(out, block, scale)

        return apply


def _grams(inputs: Inputs) -> list[tuple[Tensor, int]]:
    """Gram matrix and axis of the inputs for every source; empty where one of them has none."""
    from search.merge.statistics import gram_of

    found = [gram_of(inputs, index) for index in range(len(inputs.models))]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else []


def _solve(inputs: Inputs, grams: Sequence[tuple[Tensor, int]], weights: Sequence[float], alpha: float) -> Tensor:
    """The merged matrix, in float64 inside, of the shape of the output."""
    import torch

    from search.torch_threads import one_thread

    axis = grams[0][1]
    share = sum(weights)
    with one_thread():
        matrices = [inputs.whole(index).double() for index in range(len(grams))]
        inputs_first = [matrix if axis == 0 else matrix.T for matrix in matrices]
        mean = sum(weight * matrix for weight, matrix in zip(weights, inputs_first, strict=True)) / share
        ridge = RIDGE * sum(float(gram.diagonal().double().mean()) for gram, _ in grams) / len(grams)
        total = torch.zeros_like(grams[0][0], dtype=torch.float64, device=inputs.device)
        pull = torch.zeros_like(mean)
        # As a correction of the average, which is exact where the models agree.
        for (gram, _), weight, matrix in zip(grams, weights, inputs_first, strict=True):
            wide = gram.to(inputs.device, torch.float64)
            diagonal = wide.diagonal() * (1.0 - alpha) + (ridge or 1.0)
            scaled = (wide * alpha + torch.diag(diagonal)) * weight
            total += scaled
            pull += scaled @ (matrix - mean)
        merged = mean + torch.cholesky_solve(pull, torch.linalg.cholesky(total))
    return (merged if axis == 0 else merged.T).contiguous().to("cpu", inputs.dtype)


PLUGIN = RegMean()

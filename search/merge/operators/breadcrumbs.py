"""Model Breadcrumbs: task vectors without their smallest and largest elements, summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Breadcrumbs(Operator):
    """Keeps floor(density N) elements of each task vector below the floor(gamma N) largest magnitudes, then adds
    them as in task arithmetic.

    Where density + gamma passes 1, fewer of the largest are dropped: density decides. Of equal magnitudes the
    later in the tensor count as larger; with `compute: inputs` the order is that of torch's sort.
    """

    help = "task vectors without their smallest and largest elements, summed"
    source = "Davari 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        Parameter(
            "density", "source", "float", 1.0, "share of the elements kept, by magnitude", 0.0, 1.0, (0.1, 1.0, 0.7)
        ),
        Parameter(
            "gamma",
            "source",
            "float",
            0.01,
            "share of the largest elements dropped, while others are left",
            0.0,
            1.0,
            (0.0, 0.1, 0.01),
        ),
        Parameter("normalize", "shared", "bool", False, "divide by the sum of the weights"),
        Parameter("rescale", "shared", "bool", False, "give trimmed task vectors their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True
    prepares = "each_source"
    preparation_optional = True

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.breadcrumbs import count_magnitudes

        return count_magnitudes(inputs)

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.breadcrumbs import trims
        from search.merge.task_vectors import rescaled_factors, sum_task_vectors

        weights = [float(values["weight"]) for values in per_source]
        chosen, keys = trims(inputs, prepared, per_source)
        scales = rescaled_factors(inputs, [1.0] * len(weights), chosen, keys, bool(shared["rescale"]))
        factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
        return sum_task_vectors(inputs, per_source, shared, chosen, factors, scales)


PLUGIN = Breadcrumbs()

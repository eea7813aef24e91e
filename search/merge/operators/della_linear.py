"""DELLA with a plain sum: task vectors dropped at random, small elements first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class DellaLinear(Operator):
    """Task vectors whose elements are kept with probability density - epsilon (the smallest magnitude of its row)
    to density + epsilon (the largest), in even steps; then summed as in task arithmetic.

    Masks are drawn by `search.merge.masks`. `rescale` multiplies a masked task vector by the ratio of its
    L1 norms before and after, unless one of them is below 1e-7. Density 1 keeps everything; below, density
    - epsilon must be above 0 and density + epsilon below 1.
    """

    help = "task vectors dropped by chance and magnitude, rescaled and summed"
    source = "Deep 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        Parameter("density", "source", "float", 1.0, "mean probability of keeping", 0.0, 1.0, (0.3, 0.7, 0.6)),
        Parameter(
            "epsilon",
            "source",
            "float",
            0.15,
            "probabilities lie this far around the density",
            0.0,
            0.5,
            (0.0, 0.25, 0.15),
        ),
        Parameter("normalize", "shared", "bool", False, "divide by the sum of the weights"),
        Parameter("rescale", "shared", "bool", True, "give masked task vectors their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True
    draws = True

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        from search.merge.parameter_faults import probability_fault

        return probability_fault(per_source)

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.della_masks import drop_by_magnitude
        from search.merge.task_vectors import sum_task_vectors

        trims, factors = drop_by_magnitude(inputs, per_source, bool(shared["rescale"]))
        return sum_task_vectors(inputs, per_source, shared, trims, factors)


PLUGIN = DellaLinear()

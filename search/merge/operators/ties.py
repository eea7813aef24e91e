"""TIES: trim task vectors, elect a sign per element, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Ties(Operator):
    """Keeps the k = max(1, floor(density N)) largest magnitudes of each task vector, then merges disjointly.

    Among equal magnitudes at the threshold those with the lowest index in the flattened tensor stay.
    Density 1 keeps all, density 0 nothing. `rescale` gives a trimmed task vector its L1 norm back.
    """

    help = "trimmed task vectors, merged where their signs agree"
    source = "Yadav 2023, TIES-Merging, https://arxiv.org/abs/2306.01708"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        Parameter(
            "density",
            "source",
            "float",
            1.0,
            "share of the elements kept, by magnitude",
            0.0,
            1.0,
            (0.1, 1.0, 0.7),
        ),
        Parameter("normalize", "shared", "bool", True, "divide by the weights that agree, per element"),
        Parameter("rescale", "shared", "bool", False, "give trimmed task vectors their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
    )
    needs_base = True
    prepares = "each_source"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.count_table import count_magnitudes

        return count_magnitudes(inputs)

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.count_table import MagnitudeTrim, find_thresholds
        from search.merge.task_vectors import Trim, drop_all, elect_task_vectors, keep_all, rescaled_factors

        size = inputs.numel
        kept = [_kept(float(values["density"]), size) for values in per_source]
        thresholds = find_thresholds(inputs, prepared, {i: k for i, k in enumerate(kept) if 0 < k < size})
        trims: list[Trim] = [
            MagnitudeTrim(thresholds[i], inputs.dtype) if i in thresholds else keep_all if k else drop_all
            for i, k in enumerate(kept)
        ]
        weights = [float(values["weight"]) for values in per_source]
        keys = [("largest", k) for k in kept]
        factors = rescaled_factors(inputs, weights, trims, keys, bool(shared["rescale"]))
        return elect_task_vectors(inputs, per_source, shared, trims, factors)


def _kept(density: float, size: int) -> int:
    """How many elements a density keeps of a tensor."""
    if density >= 1.0:
        return size
    return min(size, max(1, int(density * size))) if density > 0.0 else 0


PLUGIN = Ties()

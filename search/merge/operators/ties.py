"""TIES: trim task vectors, elect a sign per element, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Ties(Operator):
    """Keeps the k = max(1, floor(density N)) largest magnitudes of each task vector, then merges disjointly.

    Among equal magnitudes at the threshold those with the lowest index in the flattened tensor stay (where
    the recipe computes in the dtype of the inputs, those that torch's sort puts first, as with mergekit).
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
            step=1 / 1024,
        ),
        Parameter("normalize", "shared", "bool", True, "divide by the weights that agree, per element"),
        Parameter("rescale", "shared", "bool", False, "give trimmed task vectors their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True
    prepares = "each_source"
    prepared_version = 2
    preparation_optional = True

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.count_table import prepare_thresholds

        return prepare_thresholds(inputs)

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.count_table import MagnitudeTrim, SortTrim, find_thresholds
        from search.merge.task_vectors import Trim, drop_all, elect_task_vectors, keep_all, rescaled_factors

        size = inputs.numel
        kept = [_kept(float(values["density"]), size) for values in per_source]
        thresholds = find_thresholds(inputs, prepared, {i: k for i, k in enumerate(kept) if 0 < k < size})

        def trim(index: int, k: int) -> Trim:
            if index not in thresholds:
                return keep_all if k else drop_all
            if inputs.compute == "inputs" and thresholds[index].last < size - 1:
                return SortTrim(inputs, index, k)
            return MagnitudeTrim(thresholds[index], inputs.dtype)

        trims = [trim(index, k) for index, k in enumerate(kept)]
        weights = [float(values["weight"]) for values in per_source]
        keys = [("largest", k) for k in kept]
        scales = rescaled_factors(inputs, [1.0] * len(weights), trims, keys, bool(shared["rescale"]))
        factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
        return elect_task_vectors(inputs, per_source, shared, trims, factors, scales)


def _kept(density: float, size: int) -> int:
    """How many elements a density keeps of a tensor."""
    if density >= 1.0:
        return size
    return min(size, max(1, int(density * size))) if density > 0.0 else 0


PLUGIN = Ties()

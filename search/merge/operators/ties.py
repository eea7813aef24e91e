"""TIES: trim task vectors, elect a sign per element, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Inputs, Parameter
from search.merge.trimmed_operators import TrimmedOperator, trim_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.task_vectors import Trimmed


class Ties(TrimmedOperator):
    """Keeps the k = max(1, floor(density N)) largest magnitudes of each task vector, then merges disjointly.

    Among equal magnitudes at the threshold those with the lowest index in the flattened tensor stay (where
    the recipe computes in the dtype of the inputs, those that torch's sort puts first, as with mergekit).
    Density 1 keeps all, density 0 nothing. `rescale` gives a trimmed task vector its L1 norm back.
    """

    help = "trimmed task vectors, merged where their signs agree"
    source = "Yadav 2023, TIES-Merging, https://arxiv.org/abs/2306.01708"
    elects = True
    parameters: ClassVar = trim_parameters(
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
        elects=True,
        normalize=True,
        rescale=False,
    )
    prepares = "each_source"
    prepared_version = 2
    preparation_optional = True

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.count_table import prepare_thresholds

        return {} if inputs.compute == "inputs" else prepare_thresholds(inputs)

    def trim(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        rescale: bool,
    ) -> Trimmed:
        from search.merge.count_table import MagnitudeTrim, find_thresholds
        from search.merge.rankings import keep_ranks
        from search.merge.task_vectors import Trim, drop_all, keep_all, rescaled

        size = inputs.numel
        kept = [_kept(float(values["density"]), size) for values in per_source]
        wanted = {i: k for i, k in enumerate(kept) if 0 < k < size}
        thresholds = find_thresholds(inputs, prepared, wanted) if inputs.compute != "inputs" else {}

        def trim_of(index: int, k: int) -> Trim:
            if index not in wanted:
                return keep_all if k else drop_all
            if inputs.compute == "inputs":
                return keep_ranks(inputs, index, 0, k, "descending")
            return MagnitudeTrim(thresholds[index], inputs.dtype)

        trims = [trim_of(index, k) for index, k in enumerate(kept)]
        return rescaled(inputs, per_source, trims, [("largest", k) for k in kept], rescale)


def _kept(density: float, size: int) -> int:
    """How many elements a density keeps of a tensor."""
    if density >= 1.0:
        return size
    return min(size, max(1, int(density * size))) if density > 0.0 else 0


PLUGIN = Ties()

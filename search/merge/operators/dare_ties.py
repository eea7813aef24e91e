"""DARE with sign election: random masks on task vectors, rescaled, then merged as in TIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class DareTies(Operator):
    """The disjoint merge of TIES on task vectors that keep each element with probability `density`.

    Masks are those of `search.merge.masks`. `rescale` multiplies a masked task vector by the ratio of
    its L1 norms before and after (not by 1 / density), unless one of them is below 1e-7.
    """

    help = "randomly dropped task vectors, merged where their signs agree"
    source = "Yu 2024, Language models are super Mario, https://arxiv.org/abs/2311.03099"
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        Parameter(
            "density",
            "source",
            "float",
            1.0,
            "probability of keeping an element",
            0.0,
            1.0,
            (0.1, 1.0, 0.7),
            step=1 / 1024,
        ),
        Parameter("normalize", "shared", "bool", False, "divide by the weights that agree, per element"),
        Parameter("rescale", "shared", "bool", True, "give masked task vectors their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True
    draws = True

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_vectors import elect_task_vectors, mask_task_vectors

        trims, factors = mask_task_vectors(inputs, per_source, bool(shared["rescale"]))
        return elect_task_vectors(inputs, per_source, shared, trims, factors)


PLUGIN = DareTies()

"""What the methods share that trim task vectors and add up what is left: TIES, DARE, DELLA, Breadcrumbs.

Each family trims in one way and has two members: a plain sum, and the sign election of TIES. The members are the
files in `search.merge.operators`. Nothing here imports torch before a merge.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.task_vectors import Trimmed


def trim_parameters(*own: Parameter, elects: bool, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    """The parameters of a member: those of its family between those that all have.

    Args:
        own: of the family, one value per source.
        elects: whether a sign is elected per element.
        normalize, rescale: the defaults.
    """
    divides = "divide by the weights that agree, per element" if elects else "divide by the sum of the weights"
    given_back = "give masked task vectors" if rescale else "give trimmed task vectors"
    return (
        Parameter("weight", "source", "float", None, "weight of the task vector", search=(0.0, 1.5, 0.5)),
        *own,
        Parameter("normalize", "shared", "bool", normalize, divides),
        Parameter("rescale", "shared", "bool", rescale, f"{given_back} their L1 norm back"),
        Parameter("lambda", "shared", "float", 1.0, "factor of the merged task vector"),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )


class TrimmedOperator(Operator):
    """A merge of trimmed task vectors.

    Class attributes:
        elects: whether a sign is elected per element, as in TIES, or all is summed.
    """

    needs_base = True
    elects: ClassVar[bool]

    @abstractmethod
    def trim(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        rescale: bool,
    ) -> Trimmed:
        """How the task vectors of this tensor are trimmed; the arguments are those of `bind`."""

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.task_vectors import elect_task_vectors, sum_task_vectors

        combine = elect_task_vectors if self.elects else sum_task_vectors
        trimmed = self.trim(inputs, prepared, per_source, bool(shared["rescale"]))
        return combine(inputs, per_source, shared, trimmed.trims, trimmed.factors, trimmed.rescales)


class DareOperator(TrimmedOperator):
    """Elements are kept by chance (Yu 2024). Masks are those of `search.merge.masks`; `rescale` multiplies a masked
    task vector by the ratio of its L1 norms before and after (not by 1 / density), unless one is below 1e-7."""

    source = "Yu 2024, Language models are super Mario, https://arxiv.org/abs/2311.03099"
    draws = True
    DENSITY: ClassVar = Parameter(
        "density", "source", "float", 1.0, "probability of keeping an element", 0.0, 1.0, (0.1, 1.0, 0.7), 1 / 1024
    )

    def trim(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        rescale: bool,
    ) -> Trimmed:
        from search.merge.task_vectors import mask_task_vectors

        return mask_task_vectors(inputs, per_source, rescale)


class DellaOperator(TrimmedOperator):
    """Elements are kept by chance, the likelier the larger they are in their row (Deep 2024): with probability
    density - epsilon (the smallest magnitude) to density + epsilon (the largest), in even steps.

    Masks are drawn by `search.merge.masks`. `rescale` multiplies a masked task vector by the ratio of its L1
    norms before and after, unless one of them is below 1e-7. Density 1 keeps everything; below, density - epsilon
    must be above 0 and density + epsilon below 1.
    """

    source = "Deep 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617"
    draws = True
    DENSITY: ClassVar = Parameter(
        "density", "source", "float", 1.0, "mean probability of keeping", 0.0, 1.0, (0.3, 0.7, 0.6)
    )
    EPSILON: ClassVar = Parameter(
        "epsilon", "source", "float", 0.15, "probabilities lie this far around the density", 0.0, 0.5, (0.0, 0.25, 0.15)
    )

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        from search.merge.parameter_faults import probability_fault

        return probability_fault(per_source)

    def trim(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        rescale: bool,
    ) -> Trimmed:
        from search.merge.della_masks import drop_by_magnitude

        return drop_by_magnitude(inputs, per_source, rescale)


class BreadcrumbsOperator(TrimmedOperator):
    """floor(density N) elements of each task vector are kept below the floor(gamma N) largest magnitudes
    (Davari 2023).

    Where density + gamma passes 1, fewer of the largest are dropped: density decides. Of equal magnitudes the
    later in the tensor count as larger; with `compute: inputs` the order is that of torch's sort.
    """

    source = "Davari 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795"
    prepares = "each_source"
    preparation_optional = True
    DENSITY: ClassVar = Parameter(
        "density", "source", "float", 1.0, "share of the elements kept, by magnitude", 0.0, 1.0, (0.1, 1.0, 0.7)
    )
    GAMMA: ClassVar = Parameter(
        "gamma",
        "source",
        "float",
        0.01,
        "share of the largest elements dropped, while others are left",
        0.0,
        1.0,
        (0.0, 0.1, 0.01),
    )

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.breadcrumbs import prepare_ranks

        return prepare_ranks(inputs)

    def trim(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        rescale: bool,
    ) -> Trimmed:
        from search.merge.breadcrumbs import drop_small_and_large

        return drop_small_and_large(inputs, prepared, per_source, rescale)

"""Model Breadcrumbs: task vectors without their smallest and largest elements, summed."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import BreadcrumbsOperator, trim_parameters


class Breadcrumbs(BreadcrumbsOperator):
    """Task vectors without their smallest and largest elements, added as in task arithmetic."""

    help = "task vectors without their smallest and largest elements, summed"
    elects = False
    parameters: ClassVar = trim_parameters(
        BreadcrumbsOperator.DENSITY, BreadcrumbsOperator.GAMMA, elects=False, normalize=False, rescale=False
    )


PLUGIN = Breadcrumbs()

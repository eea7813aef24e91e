"""Model Breadcrumbs with the sign election of TIES."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import BreadcrumbsOperator, trim_parameters


class BreadcrumbsTies(BreadcrumbsOperator):
    """Task vectors without their smallest and largest elements, merged where their signs agree, as in TIES."""

    help = "task vectors without their smallest and largest elements, merged where their signs agree"
    elects = True
    parameters: ClassVar = trim_parameters(
        BreadcrumbsOperator.DENSITY, BreadcrumbsOperator.GAMMA, elects=True, normalize=False, rescale=False
    )


PLUGIN = BreadcrumbsTies()

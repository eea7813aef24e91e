"""DELLA: task vectors dropped at random, small elements first, merged where their signs agree."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import DellaOperator, trim_parameters


class Della(DellaOperator):
    """Task vectors dropped by chance and magnitude, merged where their signs agree, as in TIES."""

    help = "task vectors dropped by chance and magnitude, rescaled, merged where their signs agree"
    elects = True
    parameters: ClassVar = trim_parameters(
        DellaOperator.DENSITY, DellaOperator.EPSILON, elects=True, normalize=True, rescale=True
    )


PLUGIN = Della()

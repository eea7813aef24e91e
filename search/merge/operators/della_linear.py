"""DELLA with a plain sum: task vectors dropped at random, small elements first."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import DellaOperator, trim_parameters


class DellaLinear(DellaOperator):
    """Task vectors dropped by chance and magnitude, summed as in task arithmetic."""

    help = "task vectors dropped by chance and magnitude, rescaled and summed"
    elects = False
    parameters: ClassVar = trim_parameters(
        DellaOperator.DENSITY, DellaOperator.EPSILON, elects=False, normalize=False, rescale=True
    )


PLUGIN = DellaLinear()

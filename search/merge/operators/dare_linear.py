"""DARE with a plain sum: random masks on task vectors, rescaled, then task arithmetic."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import DareOperator, trim_parameters


class DareLinear(DareOperator):
    """Task arithmetic on task vectors that keep each element with probability `density`."""

    help = "randomly dropped task vectors, rescaled and summed"
    elects = False
    parameters: ClassVar = trim_parameters(DareOperator.DENSITY, elects=False, normalize=False, rescale=True)


PLUGIN = DareLinear()

"""DARE with sign election: random masks on task vectors, rescaled, then merged as in TIES."""

from __future__ import annotations

from typing import ClassVar

from search.merge.trimmed_operators import DareOperator, trim_parameters


class DareTies(DareOperator):
    """The disjoint merge of TIES on task vectors that keep each element with probability `density`."""

    help = "randomly dropped task vectors, merged where their signs agree"
    elects = True
    parameters: ClassVar = trim_parameters(DareOperator.DENSITY, elects=True, normalize=False, rescale=True)


PLUGIN = DareTies()

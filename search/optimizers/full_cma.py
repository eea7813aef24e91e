"""CMA-ES that learns the whole covariance (Hansen & Ostermeier 2001), with the first step of `diagonal_cma`.

For few genes that depend on each other: what it must learn grows with the square of their number.
"""

from __future__ import annotations

from search.optimizer import Problem
from search.optimizers.diagonal_cma import Cma


def PLUGIN(problem: Problem) -> Cma:  # noqa: N802 - the name that registries look for
    """Make the optimiser for a problem."""
    return Cma(problem, diagonal=False)

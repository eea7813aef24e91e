"""CMA-ES with a diagonal covariance and a first step that fits the box (Ros & Hansen 2008, sep-CMA-ES).

nevergrad's own variants start a bounded search with steps of 2-4 % of the range, which wastes most of a
merge search's budget, and from 300 genes on use a step-size rule that does not allow candidates in
flight; both are set here. The driver owns stopping, so pycma's own stopping rules (and the restart from
the first point that follows them) are off.
"""

from __future__ import annotations

from search.nevergrad_box import NevergradBox, import_nevergrad
from search.optimizer import Problem

# On [0, 1], nevergrad turns `scale` into a standard deviation of about this much per unit.
_DEVIATION_PER_SCALE = 0.195 / 8


def PLUGIN(problem: Problem) -> NevergradBox:  # noqa: N802 - the name that registries look for
    """Make the optimiser for a problem."""
    ng, cma = import_nevergrad()
    configured = ng.families.ParametrizedCMA(
        diagonal=True,
        scale=problem.step / _DEVIATION_PER_SCALE,
        inopts={
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "tolx": 0,
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": 10**9,
            "tolstagnation": 10**9,
        },
    )
    return NevergradBox(configured, problem)

"""How good a front is, in one number: the volume it dominates (Zitzler & Thiele 1998,
https://doi.org/10.1007/BFb0056872), up to a reference point.

The reference point comes from the parents, so that it stays the same over a run: in every term the loss of the worst
parent, and a margin of a tenth of the distance between best and worst parent, so that fronts which reach no further
than the parents count as well (Ishibuchi et al. 2018, https://doi.org/10.1162/evco_a_00226). With losses that are
normalised against the parents it is 1.1 in every term, so the volume of a model that were as good as the best parent
in each of m terms is 1.1 to the power of m. A larger volume needs merges that are better than the parents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search.pareto.dominance import Losses

MARGIN = 0.1


def reference_point(parents: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The corner up to which volume counts.

    Args:
        parents: losses of every parent that could be evaluated, at least one, a number for each term. Where they
            agree on a term, the margin is a tenth of its magnitude.
    """
    losses = np.asarray(parents, dtype=np.float64)
    worst, width = losses.max(axis=0), np.ptp(losses, axis=0)
    scale = np.where(width > 0, width, np.where(worst != 0, np.abs(worst), 1.0))
    return tuple(float(value) for value in worst + MARGIN * scale)


def hypervolume(losses: Losses, reference: Sequence[float]) -> float:
    """The volume that points (n_points, n_terms) dominate below a reference point; 0 where none is below it."""
    from moocore import hypervolume as volume

    inside = losses[(losses < np.asarray(reference)).all(axis=1)] if len(losses) else losses
    return float(volume(inside, ref=np.asarray(reference, dtype=np.float64))) if len(inside) else 0.0

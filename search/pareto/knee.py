"""The knee of a front: the point from which a little less of one loss costs most of another."""

from __future__ import annotations

import numpy as np

from search.pareto.dominance import Losses


def knee(losses: Losses) -> int:
    """Index of the point of a front that lies furthest below the plane through its extremes (Das 1999, "On
    characterizing the 'knee' of the Pareto curve based on normal-boundary intersection",
    https://doi.org/10.1007/BF01195985).

    Every term is scaled to 0 for the best and 1 for the worst point of the front; the plane is that on which the
    scaled losses sum to 1. With two terms it is the line through the two extreme points. Among points that are
    equally far, the one whose largest scaled loss is smallest; then the first.

    Args:
        losses: (n_points, n_terms), at least one point.
    """
    low, width = losses.min(axis=0), np.ptp(losses, axis=0)
    scaled = (losses - low) / np.where(width > 0, width, 1.0)
    # The distance to the plane is (1 - sum) / sqrt(n_terms). Sums that differ by rounding only are equal.
    below = np.round(1.0 - scaled.sum(axis=1), 12)
    return int(np.lexsort((scaled.max(axis=1), -below))[0])

"""What every method is measured against: the peer, CMA-ES as mergekit-evolve sets it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from quality.methods import PEER
from quality.runs import Curve


@dataclass(frozen=True)
class Target:
    """Medians over the seeds of the peer.

    Attributes:
        quality: that is to be reached.
        first: what its first candidate is worth.
    """

    quality: float
    first: float


def peer_target(curves: Sequence[Curve], tolerance: float) -> Target:
    """The target of a family.

    Args:
        curves: of all methods and seeds, the peer's among them.
        tolerance: share of the peer's gain that may be missing. At its very end it moves within the noise of the items.
    """
    peers = [curve for curve in curves if curve.method == PEER]
    end = float(np.median([curve.final for curve in peers]))
    first = float(np.median([curve.quality[curve.steps[0].candidate] for curve in peers]))
    return Target(end + tolerance * max(first - end, 0.0), first)

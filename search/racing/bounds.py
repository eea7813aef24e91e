"""Is a candidate worse than its reference? Tests that may be looked at again and again.

Both are e-processes for the hypothesis that the mean difference is not above 0: whoever stops as soon as one reaches
1 / alpha is wrong with a probability of at most alpha, however often was looked (Ville 1939; Howard, Ramdas, McAuliffe
& Sekhon 2021, https://doi.org/10.1214/20-AOS1991; Waudby-Smith & Ramdas 2024, https://doi.org/10.1093/jrsssb/qkad009).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MOST = 0.5
"""Share of the capital that a bet may lose at most (the truncation c of Waudby-Smith & Ramdas 2024)."""


def betting_log_wealth(differences: Vector, low: float, population: int) -> Vector:
    """Logarithm of the capital of one who bets that the mean of a finite population is above 0, after every draw.

    The draws are without replacement, so under the hypothesis what is left has a mean that the past bounds from above
    (Waudby-Smith & Ramdas 2020, https://arxiv.org/abs/2006.04347). Bets are aGRAPA's, predictable and one-sided.

    Args:
        differences: (n,) draws so far, none below `low`.
        low: the smallest possible draw, below 0.
        population: how many there are to draw from.

    Returns:
        (n,); the capital begins at 1.
    """
    count = len(differences)
    before = np.concatenate(([0.0], np.cumsum(differences)[:-1]))
    squares = np.concatenate(([0.0], np.cumsum(differences**2)[:-1]))
    drawn = np.arange(count)
    left = np.maximum(population - drawn, 1)
    null = -before / left  # what is left has at most this mean if all have at most 0
    mean = before / (drawn + 1)
    variance = np.maximum((squares + (0.5 * low) ** 2) / (drawn + 1) - mean**2, 1e-12)
    edge = mean - null
    most = _MOST / np.maximum(null - low, 1e-12)
    bets = np.clip(edge / (variance + edge**2), 0.0, most)
    # A hypothesis that the past has refuted: what is left cannot be so bad.
    refuted = null < low
    steps = np.log1p(np.where(refuted, 0.0, bets * (differences - null)))
    wealth = np.cumsum(steps)
    wealth[np.logical_or.accumulate(refuted)] = math.inf
    return wealth


def mixture_log_evidence(mean: float, variance: float, scale: float) -> float:
    """Logarithm of the half-normal mixture of likelihood ratios for a mean above 0, at one look.

    Over the looks of a sequence of estimates with independent increments of information, as those of nested subsets
    are, it is the one-sided normal mixture of Howard et al. 2021; with a variance that is itself estimated it holds
    asymptotically (Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024, https://arxiv.org/abs/2103.06476).

    Args:
        mean: estimate of the mean difference.
        variance: of that estimate, above 0.
        scale: differences of this size are found soonest; must not depend on the data that are tested.
    """
    if not variance > 0:
        return 0.0 if mean <= 0 else math.inf
    ratio = 1 + scale**2 / variance
    z = mean / math.sqrt(variance) * math.sqrt(1 - 1 / ratio)
    return math.log(2) - 0.5 * math.log(ratio) + z * z / 2 + _log_normal_cdf(z)


def _log_normal_cdf(z: float) -> float:
    half = 0.5 * math.erfc(-z / math.sqrt(2))
    return math.log(half) if half > 0 else -z * z / 2 - math.log(-z) - 0.9189385332046727

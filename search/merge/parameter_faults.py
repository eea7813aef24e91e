"""Parameters of operators that do not go together, told before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ROUNDING = 1e-6
"""Sums below this share of the magnitudes are what rounding leaves of 0: weights are added in float32."""


def zero_sum_fault(per_source: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the weights of sources cannot be divided by their sum; None where they can."""
    weights = [float(values["weight"]) for values in per_source.values()]
    if abs(math.fsum(weights)) > ROUNDING * math.fsum(map(abs, weights)):
        return None
    told = ", ".join(f"{weight:g}" for weight in weights)
    return f"the weights {told} sum to 0, by which they would be divided; change one of them"


def probability_fault(per_source: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why DELLA cannot drop with these densities: a density below 1 that epsilon takes out of (0, 1)."""
    for source, values in per_source.items():
        density, epsilon = float(values["density"]), float(values["epsilon"])
        if density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
            return (
                f"density {density:g} of '{source}' with epsilon {epsilon:g} gives probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}, expected to lie between 0 and 1; use a smaller "
                "epsilon"
            )
    return None

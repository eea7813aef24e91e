"""Control variates: what others scored on all items, as a regression that the items seen correct.

The regression estimator of survey sampling (Cochran 1977, Sampling Techniques, chapter 7): the mean of the predictions
on all items plus the mean residual on the items seen. For predictions that do not depend on which items were seen it
is unbiased, for fitted ones nearly so; its error is that of the residuals instead of that of the scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_ROUNDS = 2


class ControlVariates:
    """Predicts the scores of a candidate on all items from those of others.

    A candidate is the one of them that is nearest to it on the items seen, plus a combination of how the others differ
    from that one. With few items the combination is held back (ridge): the coefficients are expected to be as large as
    would explain what is to be explained.

    Args:
        known: (n_others, n_items) scores of those that were scored on all items.
        weights: (n_items,) weights of the items.
    """

    def __init__(self, known: Matrix, weights: Vector) -> None:
        self._known, self._weights = known, weights

    def predict(self, seen: Vector) -> Vector:
        """(n_items,) predictions from the scores on the first items, (n_seen,)."""
        count = len(seen)
        weights = self._weights[:count] / max(float(self._weights[:count].sum()), 1e-300)
        nearest = int(np.argmin((self._known[:, :count] - seen) ** 2 @ weights))
        center = self._known[nearest]
        others = np.delete(self._known, nearest, axis=0) - center
        rest = seen - center[:count]
        total = float(rest**2 @ weights)
        if not len(others) or total == 0:
            return np.asarray(center, np.float64)
        weighted = others[:, :count] * weights
        gram, right = weighted @ others[:, :count].T, weighted @ rest
        sizes = np.maximum(np.diag(gram), 1e-12 * total)
        expected = total / sizes / len(others)
        noise = 0.5 * total
        found = np.zeros(len(others))
        for _ in range(_ROUNDS):  # the second time with the noise that the first leaves
            found = np.linalg.solve(gram + np.diag(noise / count / expected + 1e-12 * sizes), right)
            noise = float((rest - found @ others[:, :count]) ** 2 @ weights)
        return np.asarray(center + found @ others, np.float64)


def corrected_mean(predicted: Vector, residuals: Vector, weights: Vector) -> float:
    """The regression estimate of the weighted mean over all items.

    Args:
        predicted: (n_items,).
        residuals: (n_seen,) score minus prediction on the items seen, which come first.
        weights: (n_items,).
    """
    seen = weights[: len(residuals)]
    return float(weights @ predicted / weights.sum() + seen @ residuals / seen.sum())

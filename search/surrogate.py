"""A Gaussian process over merges that are scored on parts of the items, each on another part.

The loss on a part is what all parts share plus what is its own: y_b(x) = f(x) + c_b + g_b(x), where f and every g_b are
Gaussian processes with one shape (an intrinsic coregionalisation model; Bonilla, Chai & Williams 2007, Multi-task
Gaussian process prediction; Swersky, Snoek & Adams 2013, Multi-task Bayesian optimization). What is predicted is the
mean over all parts. So a part that is easy, or likes other merges than the rest does, misleads nobody, and scores of
different parts add up to one picture. The shape is a quadratic, as losses are near a good merge, and a squared
exponential for what is left. How large each of them is comes from the data, by the maximum of the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_USUAL = np.log([1.0, 0.1, 1.0, 0.1, 0.05, 1e-3])
_DOUBT = np.array([2.0, 2.0, 0.7, 2.0, 2.0, 2.0])
"""Priors, normal in logarithms, of: the quadratic, the rest and its length, level and share of a part, noise."""
_FARTHEST = 4.0
"""Sizes are looked for within so many standard deviations of their priors."""
_LEAST_NOISE = 1e-6
_STEPS = 15


@dataclass(frozen=True)
class Observed:
    """What was measured.

    Attributes:
        points: (n, d) coordinates in [-1, 1].
        parts: (n, n_parts) shares of the parts in what was measured: a one for one part, equal shares for their mean.
        losses: (n,).
    """

    points: Matrix
    parts: Matrix
    losses: Vector


class Surrogate:
    """Fits what was observed and predicts the mean over all parts.

    Attributes:
        logs: (6,) logarithms of the sizes; a new fit begins there.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self.logs: Vector = _USUAL.copy()

    def fit(self, observed: Observed, *, sizes: bool = True) -> None:
        """Condition on what was observed; `sizes`: learn those too."""
        from scipy.linalg import cho_factor, cho_solve

        self._observed = observed
        self._middle = float(observed.losses.mean())
        self._spread = float(observed.losses.std()) or 1.0
        target = (observed.losses - self._middle) / self._spread
        square, distance = self._shapes(observed.points)
        same = observed.parts @ observed.parts.T
        if sizes:
            self._learn(target, square, distance, same)
        matrix, _, _ = self._covariance(self.logs, square, distance, same)
        self._factor = cho_factor(matrix, lower=True)
        self._solved = cho_solve(self._factor, target)
        n_parts = observed.parts.shape[1]
        # Of the mean over all parts with each observation.
        shared = observed.parts.sum(1) / n_parts
        _, _, _, level, share, _ = np.exp(self.logs)
        self._times, self._plus = 1 + share * shared, level * shared
        self._own = 1 + share / n_parts, level / n_parts

    def mean(self, points: Matrix) -> Vector:
        """(m,) predictions at (m, d)."""
        return np.asarray(self._against(points) @ self._solved * self._spread + self._middle)

    def bound(self, points: Matrix, weight: float) -> Vector:
        """(m,) predictions minus `weight` standard deviations at (m, d)."""
        from scipy.linalg import solve_triangular

        cross = self._against(points)
        quadratic, rest, *_ = np.exp(self.logs)
        times, plus = self._own
        prior = (quadratic * (1 + 3 * np.square(points).mean(1)) ** 2 / 4 + rest) * times + plus
        within = solve_triangular(self._factor[0], cross.T, lower=True)
        deviation = np.sqrt(np.maximum(prior - np.square(within).sum(0), 1e-12))
        return np.asarray((cross @ self._solved - weight * deviation) * self._spread + self._middle)

    def bound_and_slope(self, point: Vector, weight: float) -> tuple[float, Vector]:
        """`bound` at one point (d,), and its gradient (d,)."""
        from scipy.linalg import cho_solve

        quadratic, rest, length, *_ = np.exp(self.logs)
        others, d = self._observed.points, self._dimension
        product = 1 + 3 * (others @ point) / d
        decay = rest * np.exp(-3 * np.square(point - others).mean(1) / (2 * length**2))
        times, plus = self._own
        cross = (quadratic * product**2 / 4 + decay) * self._times + self._plus
        slopes = self._times[:, None] * (
            (quadratic * product * 1.5 / d)[:, None] * others - (decay * 3 / d / length**2)[:, None] * (point - others)
        )
        value, slope = float(cross @ self._solved), slopes.T @ self._solved
        if weight:
            within = cho_solve(self._factor, cross)
            own = 1 + 3 * float(point @ point) / d
            variance = (quadratic * own**2 / 4 + rest) * times + plus - float(cross @ within)
            if variance > 1e-12:
                deviation = np.sqrt(variance)
                change = quadratic * own * 3 / d * point * times - 2 * slopes.T @ within
                value, slope = value - weight * deviation, slope - weight * change / (2 * deviation)
        return value * self._spread + self._middle, slope * self._spread

    def _against(self, points: Matrix) -> Matrix:
        quadratic, rest, length, *_ = np.exp(self.logs)
        square, distance = self._shapes(points)
        return np.asarray((quadratic * square + rest * np.exp(-distance / (2 * length**2))) * self._times + self._plus)

    def _shapes(self, points: Matrix) -> tuple[Matrix, Matrix]:
        """Kernel of a quadratic, and squared distances, of points with those observed."""
        others, d = self._observed.points, self._dimension
        product = points @ others.T
        distance = np.square(points).sum(1)[:, None] + np.square(others).sum(1) - 2 * product
        return (1 + 3 * product / d) ** 2 / 4, np.maximum(distance, 0) * 3 / d

    def _covariance(
        self, logs: Vector, square: Matrix, distance: Matrix, same: Matrix
    ) -> tuple[Matrix, Matrix, Matrix]:
        """Of the observations; beside it the shape of f and its second addend."""
        quadratic, rest, length, level, share, noise = np.exp(logs)
        decay = rest * np.exp(-distance / (2 * length**2))
        shape = quadratic * square + decay
        matrix = shape * (1 + share * same) + level * same
        matrix[np.diag_indices_from(matrix)] += noise + _LEAST_NOISE
        return matrix, shape, decay

    def _learn(self, target: Vector, square: Matrix, distance: Matrix, same: Matrix) -> None:
        from scipy.linalg import cho_solve
        from scipy.optimize import minimize

        eye = np.eye(len(target))

        def loss(logs: Vector) -> tuple[float, Vector]:
            matrix, shape, decay = self._covariance(logs, square, distance, same)
            quadratic, _, length, level, share, noise = np.exp(logs)
            doubt = (logs - _USUAL) / _DOUBT
            try:
                lower = np.linalg.cholesky(matrix)
            except np.linalg.LinAlgError:
                return 1e9, np.zeros(len(logs))
            inverse = cho_solve((lower, True), eye)
            solved = inverse @ target
            pull = np.outer(solved, solved) - inverse
            pulled = pull * (1 + share * same)
            slopes = (
                (pulled * square).sum() * quadratic,
                (pulled * decay).sum(),
                (pulled * decay * distance).sum() / length**2,
                (pull * same).sum() * level,
                (pull * same * shape).sum() * share,
                np.trace(pull) * noise,
            )
            value = 0.5 * target @ solved + np.log(np.diag(lower)).sum() + 0.5 * doubt @ doubt
            return float(value), np.asarray(doubt / _DOUBT - 0.5 * np.array(slopes))

        # A long step would be tried first, to where exponentials leave the range of floats.
        bounds = list(zip(_USUAL - _FARTHEST * _DOUBT, _USUAL + _FARTHEST * _DOUBT, strict=True))
        found: Any = minimize(loss, self.logs, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
        self.logs = np.asarray(found.x, np.float64)

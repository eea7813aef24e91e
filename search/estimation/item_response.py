"""Item-response estimates of 0/1 scores: MERGE^3 with parameters that are fitted here, never downloaded.

The multidimensional two-parameter logistic model says that a candidate with ability theta answers item i with
probability sigma(a_i . theta - b_i). Item parameters and abilities of parents and other fully scored candidates are
fitted together; the ability of a merge is a combination of theirs (Mencattini et al. 2025,
https://arxiv.org/abs/2502.10436), and p-IRT and gp-IRT combine what was seen with what the model predicts (Maia Polo et
al. 2024, https://arxiv.org/abs/2402.14992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_CLIP = 30.0
_SLOPE_SPREAD, _DIFFICULTY_SPREAD, _SHARE_SPREAD = 1.0, 3.0, 1.0
"""Standard deviations of the priors: of slopes around 1 / sqrt(dimensions), of difficulties and of shares."""
_NEWTON_STEPS = 12


def respondents_to_dimensions(respondents: int) -> int:
    """So many dimensions of ability can be told apart with so few respondents."""
    return 1 if respondents < 8 else 2


@dataclass(frozen=True)
class TwoParameterLogistic:
    """A fitted model.

    Attributes:
        slopes: (n_items, n_dimensions) a.
        difficulties: (n_items,) b.
        abilities: (n_respondents, n_dimensions) theta.
    """

    slopes: Matrix
    difficulties: Vector
    abilities: Matrix

    def probabilities(self, ability: Vector) -> Vector:
        """(n_items,) probability of a 1."""
        return _sigmoid(self.slopes @ ability - self.difficulties)


def fit_2pl(responses: Matrix, dimensions: int) -> TwoParameterLogistic:
    """The most probable parameters under normal priors, which few respondents need.

    Args:
        responses: (n_respondents, n_items) of 0 and 1.
        dimensions: of the abilities.
    """
    from scipy.optimize import minimize

    people, items = responses.shape
    center = 1 / np.sqrt(dimensions)
    # Where it begins decides among equals (the dimensions could be exchanged): from the data, not from chance.
    left, _, _ = np.linalg.svd(responses - responses.mean(axis=0), full_matrices=False)
    start = left[:, :dimensions] * np.sqrt(people)
    rates = responses.mean(axis=1)
    start[:, 0] = (rates - rates.mean()) / (rates.std() or 1.0)
    easy = (responses.sum(axis=0) + 0.5) / (people + 1)
    first = np.concatenate([np.full(items * dimensions, center), -np.log(easy / (1 - easy)), start.ravel()])

    def parts(x: Vector) -> tuple[Matrix, Vector, Matrix]:
        a, b = x[: items * dimensions], x[items * dimensions : items * (dimensions + 1)]
        return a.reshape(items, dimensions), b, x[items * (dimensions + 1) :].reshape(people, dimensions)

    def loss(x: Vector) -> tuple[float, Vector]:
        a, b, theta = parts(x)
        logits = np.clip(theta @ a.T - b, -_CLIP, _CLIP)
        value = float((np.logaddexp(0, logits) - responses * logits).sum())
        value += float(((a - center) ** 2).sum()) / (2 * _SLOPE_SPREAD**2)
        value += float((b**2).sum()) / (2 * _DIFFICULTY_SPREAD**2) + 0.5 * float((theta**2).sum())
        error = _sigmoid(logits) - responses
        gradient = (
            (error.T @ theta + (a - center) / _SLOPE_SPREAD**2).ravel(),
            -error.sum(axis=0) + b / _DIFFICULTY_SPREAD**2,
            (error @ a + theta).ravel(),
        )
        return value, np.concatenate(gradient)

    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return TwoParameterLogistic(*parts(np.asarray(found.x, np.float64)))


class MergedAbility:
    """Predicts the responses of a merge from those of the models that are known in full.

    Args:
        known: (n_others, n_items) of 0 and 1, parents first.
        weights: (n_items,) weights of the items.
    """

    def __init__(self, known: Matrix, weights: Vector) -> None:
        self._model = fit_2pl(known, respondents_to_dimensions(len(known)))
        self._weights = weights

    def predict(self, seen: Vector) -> Vector:
        """(n_items,) probabilities of a 1, from the responses to the first items, (n_seen,)."""
        shares = self.shares(seen)
        return self._model.probabilities(shares @ self._model.abilities)

    def shares(self, seen: Vector) -> Vector:
        """(n_others,) lambda: how the ability of the merge is combined, fitted to its responses to the first items.

        The paper fits it unconstrained; here it is held near equal shares, or a handful of items that are all right
        would have no finite answer.
        """
        model, count = self._model, len(seen)
        shares = np.full(len(model.abilities), 1 / len(model.abilities))
        center = shares.copy()
        design = model.slopes[:count] @ model.abilities.T
        weights = self._weights[:count] / max(float(self._weights[:count].mean()), 1e-300)
        prior = np.eye(len(shares)) / _SHARE_SPREAD**2
        for _ in range(_NEWTON_STEPS):
            p = _sigmoid(design @ shares - model.difficulties[:count])
            gradient = design.T @ (weights * (p - seen)) + (shares - center) / _SHARE_SPREAD**2
            curvature = (design.T * (weights * np.maximum(p * (1 - p), 1e-3))) @ design + prior
            step = np.linalg.solve(curvature, gradient)
            shares = shares - step
            if float(np.abs(step).max()) < 1e-9:
                break
        return shares


def p_irt(seen_mean: float, predicted_mean: float, share: float) -> float:
    """Mean over all items: those seen as they are, the others as predicted; `share` of the items was seen."""
    return share * seen_mean + (1 - share) * predicted_mean


def gp_irt(seen_mean: float, p_irt_mean: float, trust: float = 0.5) -> float:
    """Between the mean of the items seen and p-IRT, which varies less and may be biased."""
    return trust * seen_mean + (1 - trust) * p_irt_mean


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -_CLIP, _CLIP))), np.float64)

"""One evaluator's scores in the order of the run, and estimates of the means over all items from those of some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from search.estimation.control_variate import ControlVariates, corrected_mean
from search.estimation.item_response import MergedAbility, gp_irt, p_irt
from search.racing.config import Estimate

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

MOST_KNOWN = 12
"""So many fully scored candidates are remembered beside parents and base: the latest ones, which are most alike."""
_REFIT_AFTER = 4
"""An item-response model is fitted again after so many more fully scored candidates."""


class Model(Protocol):
    """Predicts the scores on all items from those on the first ones."""

    def predict(self, seen: Vector) -> Vector:
        """(n_items,) from (n_seen,)."""


@dataclass(frozen=True)
class Estimated:
    """What is known of a candidate in one stratum.

    Attributes:
        values: (n_metrics,) estimates of the weighted means over all items.
        residuals: (n_seen, n_metrics) what was not predicted.
    """

    values: Vector
    residuals: Matrix


class Stratum:
    """One evaluator: what fully scored candidates did, and what that says of others.

    Args:
        total: number of items.
        estimate: how metrics are estimated; metrics whose scores are not all 0 or 1 have no item-response model and
            are estimated by control variates instead.
    """

    def __init__(self, total: int, estimate: Estimate) -> None:
        self.total = total
        self._estimate: Estimate = "control_variate" if estimate == "auto" else estimate
        self.weights: Vector | None = None
        self._parents: list[Matrix] = []
        self._others: list[Matrix] = []
        self._models: dict[int, tuple[Model, bool]] = {}
        self._since_fit = 0

    def learn(self, scores: Matrix, weights: Vector, parent: bool) -> None:
        """The scores of a candidate on all items, (total, n_metrics); those of parents and base are never forgotten."""
        self.weights = weights
        if parent:
            self._parents.append(scores)
        else:
            self._others = [*self._others, scores][-MOST_KNOWN:]
        self._since_fit += 1
        keep = not parent and self._since_fit < _REFIT_AFTER
        self._models = {metric: one for metric, one in self._models.items() if one[1] and keep}
        if not keep:
            self._since_fit = 0

    def estimate(self, scores: Matrix, weights: Vector, begin: int = 0) -> Estimated:
        """What a candidate would have on all items, from its scores on some, (n_seen, n_metrics), `begin` and those
        after it in the order of the run."""
        if len(scores) == self.total:
            values = weights @ scores / weights.sum()
            return Estimated(values, scores - values)
        columns = [self._column(scores[:, metric], weights, metric, begin) for metric in range(scores.shape[1])]
        residuals = [rest for _, rest in columns] or [np.zeros((len(scores), 0))]
        return Estimated(np.array([value for value, _ in columns]), np.column_stack(residuals))

    def _column(self, seen: Vector, weights: Vector, metric: int, begin: int) -> tuple[float, Vector]:
        count = len(seen)
        plain = float(weights @ seen / weights.sum())
        if self._estimate == "none" or self.weights is None:
            return plain, seen - plain
        if begin:
            everyone = np.roll(self._known(metric), -begin, axis=1)
            rolled = np.roll(self.weights, -begin)
            predicted = ControlVariates(everyone, rolled).predict(seen)
            return corrected_mean(predicted, seen - predicted[:count], rolled), seen - predicted[:count]
        if metric not in self._models:
            self._models[metric] = self._make(metric)
        model, by_items = self._models[metric]
        predicted = model.predict(seen)
        rest = seen - predicted[:count]
        if not by_items:
            return corrected_mean(predicted, rest, self.weights), rest
        unseen = self.weights[count:]
        later = float(unseen @ predicted[count:] / unseen.sum())
        value = p_irt(plain, later, float(self.weights[:count].sum() / self.weights.sum()))
        return (value if self._estimate == "p_irt" else gp_irt(plain, value)), rest

    def _make(self, metric: int) -> tuple[Model, bool]:
        assert self.weights is not None
        known = self._known(metric)
        if self._estimate != "control_variate" and bool(np.isin(known, (0.0, 1.0)).all()):
            return MergedAbility(known, self.weights), True
        return ControlVariates(known, self.weights), False

    def _known(self, metric: int) -> Matrix:
        """(n_known, total) scores of those that were scored on all items."""
        return np.stack([scores[:, metric] for scores in (*self._parents, *self._others)])

"""When the subset of items grows: as soon as it no longer tells the latest candidates apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.racing.ladder import Ladder

Vector = NDArray[np.float64]

LATEST = 16
"""So many candidates are compared with each other, at least; and so many are scored before the subset grows again."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a candidate left unexplained.

    Attributes:
        loss: estimate on all items.
        residuals: evaluator -> (n_seen,) in the unit of the loss, on the first items.
    """

    loss: float
    residuals: Sequence[Vector]


class Levels:
    """The rung up to which candidates are scored; a function of what was told.

    Args:
        ladder: all rungs.
        precision: see `FitnessConfig.precision`.
        window: candidates in flight, whose results say nothing of a rung they were not asked for.
    """

    def __init__(self, ladder: Ladder, precision: float, window: int) -> None:
        self._ladder, self._precision = ladder, precision
        self._latest: deque[Seen] = deque(maxlen=max(LATEST, window))
        self._since = 0
        self.rung = 0

    def told(self, seen: Seen) -> None:
        """Take note of a candidate of the optimiser."""
        self._latest.append(seen)
        self._since += 1
        full = len(self._latest) == self._latest.maxlen and self._since >= len(self._latest)
        if full and self.rung < len(self._ladder.rungs) - 1 and self._too_coarse():
            self.rung += 1
            self._since = 0

    def _too_coarse(self) -> bool:
        best = min(self._latest, key=lambda one: one.loss)
        errors = [self._error(one, best) for one in self._latest if one is not best]
        spread = float(np.std([one.loss for one in self._latest]))
        return bool(np.median(errors) > self._precision * spread)

    def _error(self, one: Seen, other: Seen) -> float:
        """Standard error of the difference of two candidates on the items that both saw."""
        variance = 0.0
        for total, first, second in zip(self._ladder.totals.values(), one.residuals, other.residuals, strict=True):
            count = min(len(first), len(second))
            variance += (1 - count / total) * float(np.var(first[:count] - second[:count])) / count
        return float(np.sqrt(variance))

"""Per-item scores of candidates as shares that can be compared between candidates, items and terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.objective import Term
from search.optimizer import Result

Array = NDArray[np.float64]


class ItemTable:
    """How good candidates are on every item of every term of the objective.

    A term whose metric has no values per item counts as one item, as do the losses where nothing says what they
    measure. The items are those of the first candidate; one that was not scored on all of them has no row.

    Args:
        terms: of the objective; may be empty.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = tuple(terms)
        self._items: list[tuple[str, ...]] | None = None
        self.capacities: Array = np.zeros(0)
        """(n_items,) how much an item counts; they add up to 1, those of a term to its part of the weights."""

    def row(self, result: Result) -> Array | None:
        """(n_items,) larger is better, in the units of the metrics; None without finite scores on all items."""
        if not result.losses:
            return None
        found = [self._values(index, result) for index in range(len(self._terms) or len(result.losses))]
        if self._items is None:
            row = np.concatenate([values for values, _, _ in found])
            if not np.isfinite(row).all():
                return None
            self._items = [items for _, _, items in found]
            weights = [term.weight for term in self._terms] or [1.0] * len(found)
            shares = [_shares(part) * weight for (_, part, _), weight in zip(found, weights, strict=True)]
            self.capacities = np.concatenate(shares) / sum(weights)
            return row
        parts = []
        for (values, _, items), wanted in zip(found, self._items, strict=True):
            if items == wanted:
                parts.append(values)
                continue
            at = {item: index for index, item in enumerate(items)}
            if not all(item in at for item in wanted):
                return None
            parts.append(values[[at[item] for item in wanted]])
        row = np.concatenate(parts)
        return row if np.isfinite(row).all() else None

    def _values(self, index: int, result: Result) -> tuple[Array, Array, tuple[str, ...]]:
        """Values, weights and names of the items of a term."""
        if self._terms:
            term = self._terms[index]
            evaluator, _, metric = term.metric.partition(".")
            scores = result.scores.get(evaluator)
            if scores is not None and metric in scores.values:
                return -term.sign * np.asarray(scores.values[metric], np.float64), scores.weights, scores.items
        return np.array([-result.losses[index]]), np.ones(1), ("",)


def _shares(weights: Array) -> Array:
    total = float(weights.sum())
    return np.asarray(weights / total if total > 0 else np.full(len(weights), 1 / max(len(weights), 1)), np.float64)


def scaled(rows: Array, out: Array | None = None) -> Array:
    """(n_candidates, n_items) in [0, 1]: on every item the worst candidate has 0 and the best 1, all 0 where they are
    equal. Moves the zero that resources are counted from, and keeps what is proportional. `out` may be `rows`."""
    low = rows.min(axis=0)
    width = rows.max(axis=0) - low
    shares: Array = np.subtract(rows, low, out=out)
    shares /= np.where(width > 0, width, 1.0)
    return shares


def competition(shares: Array, capacities: Array, alpha: float = 1.0, epsilon: float = 1e-9) -> Array:
    """Fitness under competition for items: f_i = sum_j c_j s_ij / (z_j^alpha + epsilon) with z_j = sum_k s_kj
    (Abrantes 2025, M2N2, https://arxiv.org/abs/2508.16204).

    Args:
        shares: (n_candidates, n_items), not negative.
        capacities: (n_items,)
    """
    totals = shares.sum(axis=0)
    if alpha != 1:
        totals **= alpha
    return _weighted_sums(shares, capacities / (totals + epsilon))


def attraction(first: int, shares: Array, capacities: Array, epsilon: float = 1e-9, out: Array | None = None) -> Array:
    """What others have that a candidate lacks: g(A, B) = sum_j c_j / (z_j + epsilon) max(s_Bj - s_Aj, 0) for every B,
    0 for itself (as `competition`).

    Args:
        first: the row of A.
        out: room for as much as the shares, but not these: fresh memory takes longer than the sums.
    """
    totals = shares.sum(axis=0)
    lacks = np.subtract(shares, shares[first], out=out)
    np.maximum(lacks, 0.0, out=lacks)
    return _weighted_sums(lacks, capacities / (totals + epsilon))


def _weighted_sums(rows: Array, weights: Array) -> Array:
    """Without a matrix product: BLAS adds up in an order that depends on its threads."""
    return np.asarray(np.einsum("ij,j->i", rows, weights), np.float64)

"""Per-item scores of candidates as shares that can be compared between candidates, items and terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.objective import Term
from search.optimizer import Result

Array = NDArray[np.float64]


class ItemTable:
    """How good candidates are on every item of every term of the objective.

    A term whose metric has no values per item counts as one item, as do the losses where nothing says what they
    measure; the first candidate decides which terms these are. An item is known from the first candidate that was
    scored on it: its column comes behind those that were there before.

    Args:
        terms: of the objective; may be empty.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = tuple(terms)
        self._known: list[_TermItems] = []
        self.capacities: Array = np.zeros(0)
        """(n_items,) how much an item counts; they add up to 1, those of a term to its part of the weights."""

    def row(self, result: Result) -> Array | None:
        """(n_items,) larger is better, in the units of the metrics, NaN for items that were not scored. None where
        nothing was scored or a score is not finite. May add to the items."""
        if not result.losses:
            return None
        known = self._known or self._terms_of(result)
        found = [one.values(result) for one in known]
        if not all(np.isfinite(block.values).all() for block in found) or not any(len(one.values) for one in found):
            return None
        if not self._known or any(one.lacks(block) for one, block in zip(known, found, strict=True)):
            self._known = known
            self._extend(found)
        row = np.full(len(self.capacities), np.nan)
        for one, block in zip(known, found, strict=True):
            row[one.places(block.items)] = block.values
        return row

    def _terms_of(self, result: Result) -> list[_TermItems]:
        if not self._terms:
            return [_TermItems(index, None, 1.0) for index in range(len(result.losses))]
        per_item = [_block(term, result) is not None for term in self._terms]
        return [_TermItems(k, t if per_item[k] else None, t.weight) for k, t in enumerate(self._terms)]

    def _extend(self, found: Sequence[_Block]) -> None:
        width = len(self.capacities)
        for one, block in zip(self._known, found, strict=True):
            width = one.extend(block, width)
        capacities = np.zeros(width)
        for one in self._known:
            capacities[list(one.columns.values())] = _shares(np.array(list(one.weights.values()))) * one.weight
        self.capacities = capacities / sum(one.weight for one in self._known)


@dataclass(frozen=True)
class _Block:
    """What a candidate has on a term: larger values are better."""

    items: tuple[str, ...]
    values: Array
    weights: Array


_NOTHING = _Block((), np.zeros(0), np.zeros(0))


def _block(term: Term, result: Result) -> _Block | None:
    """The scores on a term, None without values per item."""
    evaluator, _, metric = term.metric.partition(".")
    scores = result.scores.get(evaluator)
    if scores is None or metric not in scores.values:
        return None
    return _Block(scores.items, -term.sign * np.asarray(scores.values[metric], np.float64), scores.weights)


class _TermItems:
    """The items of a term that are known, and their columns; `term` is None where the loss is its only item."""

    def __init__(self, index: int, term: Term | None, weight: float) -> None:
        self._index, self._term, self.weight = index, term, weight
        self.columns: dict[str, int] = {}
        self.weights: dict[str, float] = {}
        self._latest: tuple[tuple[str, ...], NDArray[np.intp]] = (), np.zeros(0, np.intp)

    def values(self, result: Result) -> _Block:
        if self._term is None:
            return _Block(("",), np.array([-result.losses[self._index]]), np.ones(1))
        return _block(self._term, result) or _NOTHING

    def lacks(self, block: _Block) -> bool:
        return block.items != self._latest[0] and any(item not in self.columns for item in block.items)

    def extend(self, block: _Block, width: int) -> int:
        """Give new items the next columns from `width` on; returns the number of columns then."""
        for item, weight in zip(block.items, block.weights, strict=True):
            if item not in self.columns:
                self.columns[item], self.weights[item] = width, float(weight)
                width += 1
        return width

    def places(self, items: tuple[str, ...]) -> NDArray[np.intp]:
        """The columns of items; most candidates have the items of the one before."""
        if items != self._latest[0]:
            self._latest = items, np.array([self.columns[item] for item in items], np.intp)
        return self._latest[1]


def _shares(weights: Array) -> Array:
    total = float(weights.sum())
    return np.asarray(weights / total if total > 0 else np.full(len(weights), 1 / max(len(weights), 1)), np.float64)


def scaled(rows: Array, out: Array | None = None) -> Array:
    """(n_candidates, n_items) in [0, 1]: on every item the worst candidate that has it is 0 and the best 1, all 0 where
    they are equal; NaN where it is not there. Moves the zero that resources are counted from, and keeps what is
    proportional. `out` may be `rows`."""
    low = np.fmin.reduce(rows, axis=0)
    width = np.fmax.reduce(rows, axis=0) - low
    shares: Array = np.subtract(rows, low, out=out)
    shares /= np.where(width > 0, width, 1.0)
    return shares


def competition(shares: Array, capacities: Array, alpha: float = 1.0, epsilon: float = 1e-9) -> Array:
    """Fitness under competition for items: f_i = sum_j c_j s_ij / (z_j^alpha + epsilon) with z_j = sum_k s_kj
    (Abrantes 2025, M2N2, https://arxiv.org/abs/2508.16204).

    Where candidates lack items, z_j is the mean of those that have the item times the number of all, and f_i is
    divided by the part of the capacity that i has. Only items on which candidates differ count there (z_j > 0): on
    others nobody wins anything, so that who was scored on more of them would seem to be worse.

    Args:
        shares: (n_candidates, n_items), not negative; NaN for an item that a candidate lacks.
        capacities: (n_items,)
    """
    totals, missing = _totals(shares)
    prices = capacities / ((totals**alpha if alpha != 1 else totals) + epsilon)
    if missing is None:
        return _weighted_sums(shares, prices)
    return _per_capacity(_weighted_sums(np.where(missing, 0.0, shares), prices), missing, capacities * (totals > 0))


def attraction(first: int, shares: Array, capacities: Array, epsilon: float = 1e-9, out: Array | None = None) -> Array:
    """What others have that a candidate lacks: g(A, B) = sum_j c_j / (z_j + epsilon) max(s_Bj - s_Aj, 0) for every B,
    0 for itself (as `competition`). Where candidates lack items, the sum is over those that A and B have, divided by
    their part of the capacity; 0 where they have none in common.

    Args:
        first: the row of A.
        out: room for as much as the shares, but not these: fresh memory takes longer than the sums.
    """
    totals, missing = _totals(shares)
    lacks = np.subtract(shares, shares[first], out=out)
    np.maximum(lacks, 0.0, out=lacks)
    prices = capacities / (totals + epsilon)
    if missing is None:
        return _weighted_sums(lacks, prices)
    missing |= missing[first]
    lacks[missing] = 0.0
    return _per_capacity(_weighted_sums(lacks, prices), missing, capacities * (totals > 0))


def _totals(shares: Array) -> tuple[Array, NDArray[np.bool_] | None]:
    """(n_items,) z_j of all candidates, and who lacks which item; None where nobody does."""
    missing = np.isnan(shares)
    if not missing.any():
        return shares.sum(axis=0), None
    having = len(shares) - missing.sum(axis=0)
    return np.where(missing, 0.0, shares).sum(axis=0) * (len(shares) / np.maximum(having, 1)), missing


def _per_capacity(sums: Array, missing: NDArray[np.bool_], capacities: Array) -> Array:
    """Sums over items divided by the part of the capacity that the items have which are there."""
    whole = float(capacities.sum())
    if not whole > 0:
        return sums
    part = 1 - _weighted_sums(missing.astype(np.float64), capacities) / whole
    # What has no item has a sum of 0; by rounding its part may differ from that.
    return np.divide(sums, part, out=np.zeros(len(sums)), where=part > 1e-9)


def _weighted_sums(rows: Array, weights: Array) -> Array:
    """Without a matrix product: BLAS adds up in an order that depends on its threads."""
    return np.asarray(np.einsum("ij,j->i", rows, weights), np.float64)

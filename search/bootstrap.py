"""Paired, stratified bootstrap of an objective over documents (Efron & Tibshirani 1993, chapters 13-16).

Every evaluator's items are one stratum. Whole documents are drawn with replacement, because items of one
document resemble each other; the same draws serve all candidates, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator, Scores
from search.objective import Objective
from search.seeds import derive_seed

RESAMPLES = 10_000
_CHUNK = 1_000

Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference on the same items.

    Attributes:
        difference: objective of the candidate minus that of the reference; below 0 the candidate is better.
        low, high: 95 % percentile interval of the difference.
        p: two-sided probability of a difference at least this far from 0 if there were none.
    """

    difference: float
    low: float
    high: float
    p: float


class Bootstrap:
    """Resampled objectives of several candidates on the same items.

    Args:
        objective: with normalisation fixed.
        evaluators: name -> evaluator; they know the documents and how scores become metrics.
        scores: candidate -> evaluator name -> per-item scores, the same items for every candidate.
        seed: seed of the run.
        resamples: number of draws.
    """

    def __init__(
        self,
        objective: Objective,
        evaluators: Mapping[str, Evaluator],
        scores: Mapping[int, Mapping[str, Scores]],
        seed: int,
        resamples: int = RESAMPLES,
    ) -> None:
        self._values = {candidate: np.zeros(resamples) for candidate in scores}
        total = sum(term.weight for term in objective.terms)
        for name in sorted({term.metric.partition(".")[0] for term in objective.terms}):
            terms = [term for term in objective.terms if term.metric.partition(".")[0] == name]
            order = sorted(next(iter(scores.values()))[name].items)
            documents = [evaluators[name].document_of(item) for item in order]
            generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "bootstrap", name)))
            for start in range(0, resamples, _CHUNK):
                count = min(_CHUNK, resamples - start)
                drawn = _draw(documents, count, generator)
                for candidate, by_evaluator in scores.items():
                    wanted = [term.metric.partition(".")[2] for term in terms]
                    resampled = metrics_of_draws(evaluators[name], wanted, sorted_scores(by_evaluator[name]), drawn)
                    for term in terms:
                        loss = np.array([term.loss(v) for v in resampled[term.metric.partition(".")[2]]])
                        self._values[candidate][start : start + count] += term.weight * loss / total

    def interval(self, candidate: int) -> tuple[float, float]:
        """95 % percentile interval of a candidate's objective."""
        low, high = np.percentile(self._values[candidate], [2.5, 97.5])
        return float(low), float(high)

    def compare(self, candidate: int, reference: int, difference: float) -> Comparison:
        """Candidate against reference; `difference` is that of the objectives on all items."""
        drawn = self._values[candidate] - self._values[reference]
        low, high = np.percentile(drawn, [2.5, 97.5])
        tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return Comparison(difference, float(low), float(high), min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def sorted_scores(scores: Scores) -> Scores:
    order = sorted(range(len(scores.items)), key=lambda index: scores.items[index])
    return Scores(
        tuple(scores.items[i] for i in order),
        {k: v[order] for k, v in scores.values.items()},
        scores.weights[order],
    )


def _draw(documents: Sequence[str], count: int, generator: np.random.Generator) -> Draws:
    """How often each item is drawn, (count, n_items)."""
    names, of_item = np.unique(np.asarray(documents), return_inverse=True)
    share = np.full(len(names), 1 / len(names))
    return generator.multinomial(len(names), share, size=count).astype(np.float64)[:, of_item]


def metrics_of_draws(
    evaluator: Evaluator, wanted: Sequence[str], scores: Scores, drawn: Draws
) -> dict[str, NDArray[np.float64]]:
    """Metric -> (count,) values on the resampled items."""
    weights = drawn @ scores.weights
    found = {
        name: (drawn @ (scores.values[name] * scores.weights)) / weights
        for name in wanted
        if evaluator.metrics[name].per_item
    }
    derived = [name for name in wanted if name not in found]
    if derived:
        rows = [evaluator.aggregate(_weighted(scores, row)) for row in drawn]
        found |= {name: np.array([row[name] for row in rows]) for name in derived}
    return found


def _weighted(scores: Scores, row: NDArray[np.float64]) -> Scores:
    return Scores(scores.items, scores.values, scores.weights * row)

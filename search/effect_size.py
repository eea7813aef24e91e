"""How large a difference is beside the spread of documents: Cohen's d of paired differences.

d_z = mean / standard deviation of the paired differences (Cohen 1988, section 2.3.5; Lakens 2013,
https://doi.org/10.3389/fpsyg.2013.00863), with the correction of Hedges 1981 for few documents. A document's part in
a metric is its jackknife pseudo-value (Efron & Tibshirani 1993, chapter 11): for a mean over items, the document's
own mean; so metrics that are no means have parts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator, Scores
from search.bootstrap import metrics_of_draws, sorted_scores
from search.objective import Objective
from search.seeds import derive_seed

RESAMPLES = 2_000
_CHUNK = 200

Parts = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A standardised difference and its 95 % interval; below 0 the candidate is better."""

    d: float
    low: float
    high: float


class DocumentParts:
    """What every document contributes to the objective of a candidate, by evaluator.

    Args:
        objective: with normalisation fixed.
        evaluators: name -> evaluator.
    """

    def __init__(self, objective: Objective, evaluators: Mapping[str, Evaluator]) -> None:
        self._objective, self._evaluators = objective, evaluators
        self._total = sum(term.weight for term in objective.terms)
        self.names = sorted({term.metric.partition(".")[0] for term in objective.terms})

    def of(self, scores: Mapping[str, Scores]) -> dict[str, Parts]:
        """Evaluator -> (n_documents,) pseudo-values of its share of the objective, documents by name.

        Their means over documents add up to the objective (to first order, where a metric is no mean).
        """
        return {name: self._parts(name, sorted_scores(scores[name])) for name in self.names}

    def _parts(self, name: str, scores: Scores) -> Parts:
        evaluator = self._evaluators[name]
        terms = [term for term in self._objective.terms if term.metric.partition(".")[0] == name]
        documents = np.asarray([evaluator.document_of(item) for item in scores.items])
        names, of_item = np.unique(documents, return_inverse=True)
        wanted = [term.metric.partition(".")[2] for term in terms]

        def value(drawn: Parts) -> Parts:
            metrics = metrics_of_draws(evaluator, wanted, scores, drawn)
            losses = [
                term.weight * np.array([term.loss(v) for v in metrics[n]])
                for n, term in zip(wanted, terms, strict=True)
            ]
            return np.asarray(sum(losses) / self._total)

        count, whole = len(names), value(np.ones((1, len(of_item))))
        if count < 2:
            return whole
        parts = np.empty(count)
        for start in range(0, count, _CHUNK):
            without = np.arange(start, min(start + _CHUNK, count))
            drawn = (of_item[None, :] != without[:, None]).astype(np.float64)
            parts[without] = count * whole - (count - 1) * value(drawn)
        return parts


class EffectSizes:
    """Standardised differences between candidates on the same items.

    With several evaluators the unit is one document of each: the mean of the sum of their parts, over the root of the
    sum of their variances.

    Args:
        scores: candidate -> evaluator name -> per-item scores, the same items for every candidate.
        seed: seed of the run.
    """

    def __init__(
        self,
        objective: Objective,
        evaluators: Mapping[str, Evaluator],
        scores: Mapping[int, Mapping[str, Scores]],
        seed: int,
    ) -> None:
        parts = DocumentParts(objective, evaluators)
        self._parts = {candidate: parts.of(one) for candidate, one in scores.items()}
        self._seed = seed

    def compare(self, candidate: int, reference: int) -> Effect | None:
        """Candidate against reference; None where all documents agree or an evaluator has fewer than three."""
        ours, theirs = self._parts[candidate], self._parts[reference]
        differences = {name: ours[name] - theirs[name] for name in ours}
        if min(map(len, differences.values())) < 3:
            return None
        mean, variance = np.zeros(1), np.zeros(1)
        drawn_mean, drawn_variance = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
        for name, values in differences.items():
            generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "effect size", name)))
            mean += values.mean()
            variance += values.var(ddof=1)
            for start in range(0, RESAMPLES, _CHUNK):
                stop = min(start + _CHUNK, RESAMPLES)
                drawn = values[generator.integers(0, len(values), (stop - start, len(values)))]
                drawn_mean[start:stop] += drawn.mean(1)
                drawn_variance[start:stop] += drawn.var(1, ddof=1)
        if not variance[0] > 0:
            return None
        correction = 1 - 3 / (4 * (min(map(len, differences.values())) - 1) - 1)
        usable = drawn_variance > 0
        low, high = np.percentile(drawn_mean[usable] / np.sqrt(drawn_variance[usable]), [2.5, 97.5])
        return Effect(*(float(correction * d) for d in (mean[0] / np.sqrt(variance[0]), low, high)))

"""The winner's curse: by how much the best of many noisy scores flatters itself, and the score without that.

The best of K candidates on the search items is partly the luckiest (Andrews, Kitagawa & McCloskey 2024, Inference on
Winners, https://doi.org/10.1093/qje/qjad043). How lucky is found by doing it again: documents are drawn with
replacement, the finalists are chosen anew on the draw, and their scores there are compared with those on all
documents (the optimism of Efron & Tibshirani 1993, chapter 17). The same draws serve all candidates, so what makes a
draw easy for every one of them is no luck of a winner. Among equals, where the flattery
is greatest, part of it stays (simulations in tests/test_verdict_statistics.py); of a winner far ahead nothing is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator, Scores
from search.effect_size import DocumentParts
from search.objective import Objective
from search.seeds import derive_seed

RESAMPLES = 2_000
MOST_CANDIDATES = 100
"""The best on the search items; those behind are never among the finalists of a draw."""
_CHUNK = 100

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Optimism:
    """What the search saw of its winner, and what it is. Values of the objective, smaller is better.

    Attributes:
        candidates: how many candidates it was the best of.
        search: on the search items, which it was found with: flattered.
        shrunken: the same without the expected flattery; where candidates are scored on parts of the items, what the
            optimiser expects of all items, by all that it was told.
        select: on the select items, on which it was chosen among the finalists: flattered a little.
        certify: on the certify items: unbiased, nothing was chosen on them.
        reference: label of the best baseline, and its values on the search and certify items: items differ in
            difficulty, which what both have in common takes out. None where there is none.
        on_part: number of search items, if it was scored on a part of them: `search` is then an estimate.
        pooled: whether `shrunken` comes from the optimiser.
    """

    candidates: int
    search: float
    shrunken: float
    select: float
    certify: float
    reference: str | None = None
    reference_search: float | None = None
    reference_certify: float | None = None
    on_part: int | None = None
    pooled: bool = False

    @property
    def seen_lead(self) -> float | None:
        """By how much the winner was ahead of the reference on the search items."""
        return None if self.reference_search is None else self.reference_search - self.search

    @property
    def shrunken_lead(self) -> float | None:
        """The same without the expected flattery."""
        return None if self.reference_search is None else self.reference_search - self.shrunken

    @property
    def certified_lead(self) -> float | None:
        """By how much it is on the certify items."""
        return None if self.reference_certify is None else self.reference_certify - self.certify

    @property
    def flattery(self) -> float:
        """Value on the search items minus that on the certify items, in the lead where there is a reference."""
        if self.seen_lead is not None and self.certified_lead is not None:
            return self.certified_lead - self.seen_lead
        return self.search - self.certify


def expected_optimism(parts: Sequence[Matrix], chosen: int, seed: int, resamples: int = RESAMPLES) -> float:
    """What the `chosen` best of many lack, on average, of the objective that they seem to have; at most about 0.

    Args:
        parts: of every evaluator (n_documents, n_candidates): what documents contribute, see `DocumentParts`.
        chosen: how many are taken, the smallest first.
        seed: seed of the run.
    """
    on_all = sum(part.mean(0) for part in parts)
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "selection bias")))
    total = 0.0
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = np.zeros((count, parts[0].shape[1]))
        for part in parts:
            documents = len(part)
            drawn += generator.multinomial(documents, np.full(documents, 1 / documents), size=count) @ part / documents
        # What a draw does to all alike is no luck of the chosen.
        gained = drawn - on_all - (drawn - on_all).mean(1, keepdims=True)
        best = np.argpartition(drawn, chosen - 1, axis=1)[:, :chosen] if chosen < drawn.shape[1] else None
        total += float((gained if best is None else np.take_along_axis(gained, best, 1)).mean(1).sum())
    return total / resamples


def expected_flattery(
    objective: Objective,
    evaluators: Mapping[str, Evaluator],
    scores: Mapping[int, Mapping[str, Scores]],
    winner: int,
    chosen: int,
    seed: int,
) -> float:
    """How much of its objective on the search items the winner owes to having been chosen there; at most about 0.

    Args:
        scores: candidate -> evaluator name -> scores on the search items; candidates with other items than the winner
            (stopped early) are left out.
        chosen: how many finalists were chosen.
    """
    value = DocumentParts(objective, evaluators)
    items = {name: frozenset(scores[winner][name].items) for name in value.names}
    same = [
        candidate
        for candidate, one in scores.items()
        if all(name in one and frozenset(one[name].items) == items[name] for name in value.names)
    ]
    of_all = {candidate: value.of(scores[candidate]) for candidate in same}
    seen = {candidate: sum(float(part.mean()) for part in parts.values()) for candidate, parts in of_all.items()}
    best = sorted(same, key=lambda candidate: (seen[candidate], candidate))[:MOST_CANDIDATES]
    if winner not in best:
        return 0.0
    parts = [np.stack([of_all[candidate][name] for candidate in best], 1) for name in value.names]
    return expected_optimism(parts, min(chosen, len(best)), seed)

"""Baselines that interpolate between two sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Annotated

from pydantic import AfterValidator, Field

from search.baseline import BaselineOptions, Generation0, Proposal, parents_by_loss
from search.curves import slerp_rule
from search.scales import Distinct

ALL_PAIRS_UP_TO = 3


def _within(shares: Sequence[float]) -> Sequence[float]:
    for t in shares:
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"t is {t:g}, expected 0 (the first source) to 1 (the second)")
    return shares


class PairOptions(BaselineOptions):
    """Options of `slerp` and `nuslerp`."""

    t: Annotated[Distinct, AfterValidator(_within), Field(description="0: first of a pair, 1: second")] = (0.5,)


class PairBaseline:
    """SLERP between pairs of sources, of the models or of their task vectors.

    Args:
        name: the family in labels.
    """

    Options = PairOptions

    def __init__(self, name: str, task_vectors: bool) -> None:
        self._name, self._task_vectors = name, task_vectors

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        chosen = list(known.sources)
        if len(chosen) > ALL_PAIRS_UP_TO:
            chosen = (yield from parents_by_loss(known))[:2]
        for first, second in combinations(chosen, 2):
            for t in known.options.t:
                shares = {first: 1.0 - t, second: t}
                weights = {source: shares.get(source, 0.0) for source in known.sources}
                label = f"{self._name} {first}+{second}" + ("" if t == 0.5 else f" t{t:g}")
                yield Proposal(label, slerp_rule(first, second, t, task_vectors=self._task_vectors), weights)

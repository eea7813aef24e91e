"""The sweep of a method that trims task vectors: densities at one lambda, then other lambdas at the best density.

Both go on below their smallest value where that is the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pydantic import Field

from search.baseline import BaselineOptions, Generation0, Proposal, best_of, with_default
from search.recipe import Rule
from search.scales import Distinct
from search.sweep import HALVINGS, swept


class SweepOptions(BaselineOptions):
    """Options of `ties` and `dare_ties`."""

    densities: Distinct = Field(description="shares of a task vector that are kept")
    lambdas: Distinct = Field((1.0,), description="factors on the merged task vector, such as [0.5, 1, 1.5]")
    grid: bool = Field(False, description="every density with every lambda, not only the best density")
    halvings: int = HALVINGS


class TiesSweep:
    """A baseline that merges all sources with equal weights by one operator.

    Args:
        operator: its name, and that of the baseline.
        densities: those that are tried by default.
    """

    def __init__(self, operator: str, densities: tuple[float, ...]) -> None:
        self._operator = operator
        self.Options = with_default(SweepOptions, "densities", Distinct, densities)

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        options = known.options
        first = 1.0 if 1.0 in options.lambdas else options.lambdas[0]
        if options.grid:
            every = product(options.densities, options.lambdas)
            for density, scale in sorted(every, key=lambda pair: pair[1] != first):
                yield self._proposal(known, density, scale)
            return
        tried = yield from swept(known, options.densities, options.halvings, lambda d: self._proposal(known, d, first))
        best = tried[(yield from best_of(known, list(tried)))]
        yield from swept(
            known, options.lambdas, options.halvings, lambda scale: self._proposal(known, best, scale), tried=(first,)
        )

    def _label(self, density: float, scale: float) -> str:
        return f"{self._operator} {density:g}" + ("" if scale == 1.0 else f" x{scale:g}")

    def _proposal(self, known: Generation0, density: float, scale: float) -> Proposal:
        sources = {source: {"weight": 1.0, "density": density} for source in known.sources}
        parameters = {} if scale == 1.0 else {"lambda": scale}
        rule = Rule.model_validate({"operator": self._operator, "sources": sources, "parameters": parameters})
        return Proposal(self._label(density, scale), rule)

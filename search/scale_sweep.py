"""The sweep of a method whose one setting is the factor on the merged task vector."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from search.baseline import BaselineOptions, Generation0, Proposal, with_default
from search.recipe import Rule
from search.scales import Scales
from search.sweep import HALVINGS, swept


class ScaleOptions(BaselineOptions):
    """Options of `tsv_m` and `iso_c`."""

    scales: Scales = Field(description="factors on the merged task vector, or paper for 0, 0.05 ... 1")
    halvings: int = HALVINGS


class ScaleSweep:
    """A baseline that merges all sources by one operator, at every `lambda`; see `swept`.

    Args:
        operator: its name, and that of the baseline.
        scales: those that are tried by default.
    """

    def __init__(self, operator: str, scales: tuple[float, ...]) -> None:
        self._operator = operator
        self.Options = with_default(ScaleOptions, "scales", Scales, scales)

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        def proposal(scale: float) -> Proposal:
            rule = Rule(
                operator=self._operator,
                sources={source: {} for source in known.sources},
                parameters={"lambda": scale},
            )
            # A search with this operator can start there if it searches weights; for others they mean something else.
            weights = dict.fromkeys(known.sources, scale) if self._operator in known.operators else None
            return Proposal(f"{self._operator} {scale:g}", rule, weights)

        yield from swept(known, known.options.scales, known.options.halvings, proposal)

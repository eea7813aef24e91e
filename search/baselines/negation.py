"""Task arithmetic, negation: base - scale * task vector (Ilharco 2023, https://arxiv.org/abs/2212.04089).

It makes a model worse at what the source was tuned for, so whether it is good depends on the objective: one
that rewards a lower loss everywhere will not choose it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from search.baseline import BaselineOptions, Facts, Generation0, Proposal, known_source, vectors_rule
from search.scales import Scales


class Negation:
    """The base without what one source learned, at every scale."""

    class Options(BaselineOptions):
        """Options of `negation`."""

        forget: str = Field(description="source whose task vector is subtracted")
        scales: Scales = Field((0.3, 0.5, 1.0), description="how much of it; paper: 0, 0.05 ... 1")

    def check(self, options: Options, facts: Facts) -> None:
        known_source("forget", options.forget, facts)

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        forget = known.options.forget
        for scale in known.options.scales:
            weights = {source: -scale if source == forget else 0.0 for source in known.sources}
            yield Proposal(f"negation:{forget} {scale:g}", vectors_rule(weights), weights)


PLUGIN = Negation()

"""Task arithmetic, analogy: a is to b as c is to ? (Ilharco 2023, https://arxiv.org/abs/2212.04089).

base + scale * (tau_c + tau_b - tau_a), as in the paper; with `start: c` it is c + scale * (b - a), which is
the same at scale 1 and needs no base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from search.baseline import BaselineOptions, Facts, Generation0, Proposal, known_source, vectors_rule
from search.errors import UserError
from search.scales import Scales


class Analogy:
    """What is to c as b is to a, at every scale."""

    class Options(BaselineOptions):
        """Options of `analogy`."""

        a: str = Field(description="source: a is to b")
        b: str = Field(description="source: as a is to b")
        c: str = Field(description="source: so c is to what is made")
        start: Literal["base", "c"] = Field("base", description="where the scaled step starts")
        scales: Scales = Field((0.3, 0.5, 0.7, 1.0), description="length of the step; paper: 0, 0.05 ... 1")

    def check(self, options: Options, facts: Facts) -> None:
        for key, name in (("a", options.a), ("b", options.b), ("c", options.c)):
            known_source(key, name, facts)
        if len({options.a, options.b, options.c}) < 3:
            raise UserError(
                f"a, b and c are {options.a}, {options.b} and {options.c}; an analogy needs three different sources"
            )

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        options = known.options
        for scale in options.scales:
            of_c = scale if options.start == "base" else 1.0
            made = {options.a: -scale, options.b: scale, options.c: of_c}
            weights = {source: made.get(source, 0.0) for source in known.sources}
            yield Proposal(f"analogy:{options.a}:{options.b}::{options.c} {scale:g}", vectors_rule(weights), weights)


PLUGIN = Analogy()

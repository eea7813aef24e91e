"""SLERP of two sources with a t that changes over the layers.

`opposed` is the curve of mergekit's examples, by which attention goes one way while the MLPs go the other;
`up` and `down` go from one source in the first layers to the other in the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from search.baseline import BaselineOptions, Facts, Generation0, Proposal, known_source, parents_by_loss
from search.curves import Curve, slerp_rules
from search.errors import UserError, nearest
from search.scales import at_depth, not_empty

CURVES: Mapping[str, Mapping[str, Curve]] = {
    "opposed": {"attention": (0.0, 0.5, 0.3, 0.7, 1.0), "mlp": (1.0, 0.5, 0.7, 0.3, 0.0)},
    "up": {"*": (0.0, 1.0)},
    "down": {"*": (1.0, 0.0)},
}

T = Annotated[float, Field(ge=0, le=1)]


class SlerpCurve:
    """SLERP with t by depth: the known curves, or one's own."""

    class Options(BaselineOptions):
        """Options of `slerp_curve`."""

        pair: tuple[str, str] | None = Field(None, description="the sources at t = 0 and 1; default: the best two")
        curves: tuple[str, ...] = Field(tuple(CURVES), description="opposed, up, down")
        t: Annotated[tuple[T, ...], AfterValidator(not_empty)] | None = Field(
            None, description="t over all layers, from the first to the last, linear in between; tried as well"
        )
        rest: T = Field(0.5, description="t of tensors outside of the layers, and of those without a curve")

        @model_validator(mode="after")
        def _curves_exist(self) -> SlerpCurve.Options:
            for index, name in enumerate(self.curves):
                if name not in CURVES:
                    raise ValueError(f"no curve is called '{name}'{nearest(name, CURVES)}")
                if name in self.curves[:index]:
                    raise ValueError(f"the curve '{name}' stands twice")
            if not self.curves and self.t is None:
                raise ValueError("curves is empty and t is not given; nothing to try")
            return self

    def check(self, options: Options, facts: Facts) -> None:
        if len(facts.sources) < 2:
            raise UserError("takes two sources, the config has one")
        for name in options.pair or ():
            known_source("pair", name, facts)
        if options.pair is not None and options.pair[0] == options.pair[1]:
            raise UserError(f"pair: '{options.pair[0]}' stands twice; expected two sources")

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        options = known.options
        first, second = options.pair or (yield from parents_by_loss(known))[:2]
        tried = {name: CURVES[name] for name in options.curves}
        if options.t is not None:
            tried["t"] = {"*": options.t}
        for name, curves in tried.items():
            rules = slerp_rules(known.tensors, first, second, curves, options.rest)
            mean = sum(sum(at_depth(c, step / 10) for step in range(11)) / 11 for c in curves.values()) / len(curves)
            shares = {first: 1.0 - mean, second: mean}
            weights = {source: shares.get(source, 0.0) for source in known.sources}
            yield Proposal(f"slerp_curve {name} {first}+{second}", rules, weights)


PLUGIN = SlerpCurve()

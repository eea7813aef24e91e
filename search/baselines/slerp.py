"""SLERP half way between two sources (Shoemake 1985): all pairs of up to three, else the best two."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from search.baseline import Generation0, Proposal, parents_by_loss
from search.recipe import Rule

_ALL_PAIRS_UP_TO = 3


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """SLERP at t = 0.5 between pairs of sources."""
    chosen = list(known.sources)
    if len(chosen) > _ALL_PAIRS_UP_TO:
        chosen = (yield from parents_by_loss(known))[:2]
    for first, second in combinations(chosen, 2):
        rule = Rule(operator="slerp", sources={first: {}, second: {}}, parameters={"t": 0.5})
        weights = {source: (0.5 if source in (first, second) else 0.0) for source in known.sources}
        yield Proposal(f"slerp {first}+{second}", rule, weights)

"""The Karcher mean of all sources: the SLERP of several models.

The point on the sphere whose squared angles to the sources are least; for two sources SLERP at t = 0.5, and
for more it does not depend on an order, other than SLERP of one pair after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from search.baseline import Generation0, Proposal
from search.recipe import Rule


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """Karcher mean of all sources."""
    share = 1 / len(known.sources)
    rule = Rule(operator="karcher", sources={source: {} for source in known.sources})
    yield Proposal("karcher", rule, dict.fromkeys(known.sources, share))

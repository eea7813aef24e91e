"""The 0.5 blend: the mean of two sources, all pairs of up to three, else the best two.

The plainest merge there is, and hard to beat: a searched merge was found no better than it (within 0.004) where
that was tested on held-out items.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from search.baseline import Generation0, Proposal, parents_by_loss, soup_rule
from search.pair_baseline import ALL_PAIRS_UP_TO


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """Mean of two sources."""
    chosen = list(known.sources)
    if len(chosen) > ALL_PAIRS_UP_TO:
        chosen = (yield from parents_by_loss(known))[:2]
    for pair in combinations(chosen, 2):
        weights = {source: 0.5 if source in pair else 0.0 for source in known.sources}
        yield Proposal(f"blend {'+'.join(pair)}", soup_rule(pair), weights)

"""Greedy soup (Wortsman 2022, https://arxiv.org/abs/2203.05482, recipe 1).

Sources are sorted by their score on the search items; each is added in turn and kept if the mean of all
kept so far and it is not worse than without it. Not worse (>=) is the rule of the paper; the code that was
released with it wants strictly better.
"""

from __future__ import annotations

from collections.abc import Iterator

from search.baseline import Generation0, Proposal, parent_label, parents_by_loss, soup_rule


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """Mean of the sources that help, added best first."""
    ranked = yield from parents_by_loss(known)
    soup: tuple[str, ...] = (ranked[0],)
    best = known.loss(parent_label(ranked[0]))
    for source in ranked[1:]:
        attempt = (*soup, source)
        label = "greedy_soup+" + "+".join(attempt)
        yield Proposal(label, soup_rule(attempt), _shares(attempt, known.sources), step=True)
        while (loss := known.loss(label)) is None:
            yield None
        if best is None or loss <= best:
            soup, best = attempt, loss
    # The same recipe as the last one that was kept, so it is not evaluated again.
    yield Proposal("greedy_soup", soup_rule(soup), _shares(soup, known.sources))


def _shares(members: tuple[str, ...], sources: tuple[str, ...]) -> dict[str, float]:
    return {source: (1 / len(members) if source in members else 0.0) for source in sources}

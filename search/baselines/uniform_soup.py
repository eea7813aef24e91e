"""The mean of all sources (Wortsman 2022, https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

from collections.abc import Iterator

from search.baseline import Generation0, Proposal, soup_rule


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """Mean of all sources."""
    share = 1 / len(known.sources)
    yield Proposal("uniform_soup", soup_rule(known.sources), dict.fromkeys(known.sources, share))

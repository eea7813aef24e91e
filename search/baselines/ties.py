"""TIES at the densities in use (Yadav 2023, https://arxiv.org/abs/2306.01708): the paper's 0.2, and 0.5, 1."""

from __future__ import annotations

from collections.abc import Iterator

from search.baseline import Generation0, Proposal
from search.recipe import Rule

DENSITIES = (0.2, 0.5, 1.0)


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """TIES of all sources with equal weights and lambda 1, at three densities."""
    for density in DENSITIES:
        sources = {source: {"weight": 1.0, "density": density} for source in known.sources}
        yield Proposal(f"ties {density:g}", Rule(operator="ties", sources=sources))

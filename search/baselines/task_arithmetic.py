"""Task arithmetic at a few scales (Ilharco 2023, https://arxiv.org/abs/2212.04089)."""

from __future__ import annotations

from collections.abc import Iterator

from search.baseline import Generation0, Proposal
from search.recipe import Rule

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def PLUGIN(known: Generation0) -> Iterator[Proposal | None]:  # noqa: N802 - the name that registries look for
    """Sum of all task vectors, at seven scales."""
    for scale in SCALES:
        rule = Rule(operator="task_arithmetic", sources={source: {"weight": scale} for source in known.sources})
        yield Proposal(f"task_arithmetic {scale:g}", rule, dict.fromkeys(known.sources, scale))

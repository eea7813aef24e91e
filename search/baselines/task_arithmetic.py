"""Task arithmetic, addition: base + scale * sum of task vectors (Ilharco 2023, https://arxiv.org/abs/2212.04089)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from search.baseline import BaselineOptions, Generation0, Proposal
from search.recipe import Rule
from search.scales import Scales
from search.sweep import HALVINGS, swept

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class TaskArithmetic:
    """Sum of all task vectors, at every scale and, where the smallest is the best, at smaller ones."""

    class Options(BaselineOptions):
        """Options of `task_arithmetic`."""

        scales: Scales = Field(SCALES, description="weights of the task vectors; paper: 0, 0.05 ... 1")
        halvings: int = HALVINGS

    def __call__(self, known: Generation0) -> Iterator[Proposal | None]:
        def proposal(scale: float) -> Proposal:
            rule = Rule(operator="task_arithmetic", sources={source: {"weight": scale} for source in known.sources})
            return Proposal(f"task_arithmetic {scale:g}", rule, dict.fromkeys(known.sources, scale))

        yield from swept(known, known.options.scales, known.options.halvings, proposal)


PLUGIN = TaskArithmetic()

"""Settings of a baseline one after the other, and smaller ones where the smallest of them is the best."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from pydantic import Field

from search.baseline import Generation0, Proposal, best_of

HALVINGS: Any = Field(
    3, ge=0, le=20, description="how often half of the smallest is tried next, while the smallest is better than all"
)
"""The option. Of many sources less of each is best: a grid that ends above it makes the baseline weaker than it is."""


def swept(
    known: Generation0,
    values: Sequence[float],
    halvings: int,
    make: Callable[[float], Proposal],
    tried: Sequence[float] = (),
) -> Generator[Proposal | None, None, dict[str, float]]:
    """Propose some values, then half of the smallest as long as that is the one best; returns label -> value.

    Args:
        values: distinct; below one that is not positive there is nothing to try.
        halvings: at most so many more.
        make: value -> its proposal.
        tried: those of the values that were proposed before.
    """
    labels: dict[str, float] = {}
    for value in values:
        proposal = make(value)
        labels[proposal.label] = value
        if value not in tried:
            yield proposal
    while halvings > 0 and min(labels.values()) > 0:
        best = yield from best_of(known, list(labels))
        smallest = min(labels, key=lambda label: labels[label])
        rivals = [loss for label in labels if label != smallest and (loss := known.loss(label)) is not None]
        if best != smallest or (known.loss(smallest) or 0.0) in rivals:
            break
        proposal = make(labels[smallest] / 2)
        labels[proposal.label] = labels[smallest] / 2
        halvings -= 1
        yield proposal
    return labels

"""From the history of a run: which candidate was the best known after how many item-evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from search.population import SEARCHED
from search.store.events import Ask, Event, Trial
from search.trials import may_be_best


@dataclass(frozen=True)
class Step:
    """After so many item-evaluations, this candidate is the best known."""

    items: int
    candidate: int


def incumbents(events: Iterable[Event], from_zero: bool, rotate: bool) -> tuple[list[Step], int]:
    """The best known candidates, and the item-evaluations in all.

    A candidate that repeats an earlier recipe costs nothing. One whose evaluation was stopped is no best, as for the
    program itself.

    Args:
        from_zero: whether candidates of generation 0 count, as costs and as best ones.
        rotate: whether candidates were scored on different parts of the items.
    """
    origins: dict[int, str] = {}
    steps: list[Step] = []
    items, best = 0, np.inf
    for event in events:
        if isinstance(event, Ask):
            origins[event.candidate] = event.origin
        elif isinstance(event, Trial) and event.items == "search":
            if not from_zero and origins[event.candidate] != SEARCHED:
                continue
            if event.attempts:
                items += sum(len(scores.items) for scores in event.scores.values())
            if event.loss is not None and may_be_best(event, rotate) and event.loss < best:
                best = event.loss
                steps.append(Step(items, event.candidate))
    return steps, items


def items_to_reach(steps: Sequence[Step], quality: Callable[[int], float], target: float) -> float:
    """Item-evaluations from which on the best known candidate is at least this good; infinite if it never is."""
    reached = np.inf
    for step in steps:
        if quality(step.candidate) > target:
            reached = np.inf
        elif np.isinf(reached):
            reached = step.items
    return float(reached)

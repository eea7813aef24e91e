"""What a baseline is: a standard merge that generation 0 evaluates before the search proper.

A baseline is a generator. It yields proposals, and None when it must know a result first; the next one
is then asked again after a result came. So all baselines run side by side on all workers, and what they
propose depends on results told, never on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass

from evaluators.registry import Registry
from search.recipe import Rule, Value


@dataclass(frozen=True)
class Proposal:
    """One recipe of generation 0.

    Attributes:
        label: unique in the run, shown to people.
        rule: the merge, for all tensors.
        weights: the weight of every source's task vector that comes closest, where there is one: a
            search over weights can start there.
        step: whether it only serves to find a later proposal of the same baseline and is no result of
            its own.
    """

    label: str
    rule: Rule
    weights: Mapping[str, float] | None = None
    step: bool = False


@dataclass(frozen=True)
class Generation0:
    """What a baseline may know.

    Attributes:
        sources: names of the sources, in the order of the config.
        loss: label -> loss on the search items, None while it is not known. Losses are comparable once
            all parents are known, and only then given.
    """

    sources: tuple[str, ...]
    loss: Callable[[str], float | None]


Baseline = Callable[[Generation0], Iterator[Proposal | None]]

BASELINES: Registry[Baseline] = Registry("baseline", "search.baselines", "meiosis.baselines")


def parent_label(source: str) -> str:
    """The label of the candidate that is a source as it is."""
    return f"parent:{source}"


def soup_rule(members: Mapping[str, float] | tuple[str, ...]) -> Rule:
    """A weighted sum of models; for names alone, their mean (Wortsman 2022, model soups)."""
    weights = dict(members) if isinstance(members, Mapping) else dict.fromkeys(members, 1.0)
    sources: dict[str, dict[str, Value]] = {name: {"weight": weight} for name, weight in weights.items()}
    return Rule(operator="linear", sources=sources)


def parents_by_loss(known: Generation0) -> Generator[None, None, list[str]]:
    """Wait, by yielding None, until every parent's loss is known; returns the sources, best first."""
    losses: dict[str, float] = {}
    while len(losses) < len(known.sources):
        losses = {s: loss for s in known.sources if (loss := known.loss(parent_label(s))) is not None}
        if len(losses) < len(known.sources):
            yield None
    return sorted(known.sources, key=lambda source: losses[source])

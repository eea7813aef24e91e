"""What a baseline is: a standard merge that generation 0 evaluates before the search proper.

A baseline is a generator. It yields proposals, and None when it must know a result first; the next one
is then asked again after a result came. So all baselines run side by side on all workers, and what they
propose depends on results told, never on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, create_model

from evaluators.base import Evaluator
from evaluators.registry import Registry
from search.candidate import PARENT
from search.errors import UserError, nearest
from search.grouping import Group
from search.objective import Term
from search.recipe import Rule, Value
from search.soups.plan import LearnSoup


class BaselineOptions(BaseModel):
    """Base of a baseline's options, and the options of one that has none: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


NO_OPTIONS = BaselineOptions()


def with_default(options: type[BaselineOptions], key: str, kind: Any, default: object) -> type[BaselineOptions]:
    """Options of which one key, of this type, has another default: for baselines that differ in their operator."""
    field = Field(default, description=options.model_fields[key].description)
    fields: dict[str, Any] = {key: (kind, field)}
    return create_model(options.__name__, __base__=options, **fields)


@dataclass(frozen=True)
class Proposal:
    """One recipe of generation 0.

    Attributes:
        label: unique in the run, shown to people. What stands before the first blank is the family, of
            which the table at the end has the best.
        rule: the merge: one rule for all tensors, or several of which the first that matches a tensor holds.
        weights: the weight of every source's task vector that comes closest, where there is one: a
            search over weights can start there.
        step: whether it only serves to find a later proposal of the same baseline and is no result of
            its own.
        learn: what a worker shall learn from there; comes back with `Generation0.metrics`.
    """

    label: str
    rule: Rule | tuple[Rule, ...]
    weights: Mapping[str, float] | None = None
    step: bool = False
    learn: LearnSoup | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (self.rule,) if isinstance(self.rule, Rule) else self.rule


@dataclass(frozen=True)
class Generation0:
    """What a baseline may know.

    Attributes:
        sources: names of the sources, in the order of the config.
        loss: label -> loss on the search items, None while it is not known. Losses are comparable once
            all parents are known, and only then given.
        metrics: label -> metrics of its trial, from the same moment as the loss; empty for a failure.
        terms: the terms of the objective, normalised once all parents are known.
        groups: the tensors of the models, as the space groups them.
        options: an instance of the baseline's `Options`.
        operators: what the space searches with; empty where nobody said.
    """

    sources: tuple[str, ...]
    loss: Callable[[str], float | None]
    metrics: Callable[[str], Mapping[str, float] | None] = lambda _: None
    terms: Callable[[], tuple[Term, ...]] = tuple
    groups: tuple[Group, ...] = ()
    options: Any = NO_OPTIONS
    operators: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of a forward pass."""
        return tuple(tensor for group in self.groups for tensor in group.tensors)


@dataclass(frozen=True)
class Facts:
    """What is known of a search before it starts.

    Attributes:
        sources: names of the sources.
        evaluators: name -> evaluator, not prepared; without those that could not be made.
        metrics: those of the objective, as `<evaluator>.<metric>`.
    """

    sources: tuple[str, ...]
    evaluators: Mapping[str, Evaluator]
    metrics: tuple[str, ...]


Baseline = Callable[[Generation0], Iterator[Proposal | None]]
"""A function, or an object that can be called like one. It may have `Options`, a subclass of `BaselineOptions`
for the keys under its name in the config, and `check(options, facts)`, which raises `UserError` for what
will not work; both are used before anything is spent."""

BASELINES: Registry[Baseline] = Registry("baseline", "search.baselines", "meiosis.baselines")


def options_class(name: str) -> type[BaselineOptions]:
    """The options of a baseline.

    Raises:
        UserError: no such baseline, or one that cannot be imported.
    """
    return cast(type[BaselineOptions], getattr(BASELINES.get(name), "Options", BaselineOptions))


def check_baseline(name: str, options: Mapping[str, Any], facts: Facts) -> BaselineOptions:
    """The options of a baseline, checked and complete.

    Raises:
        pydantic.ValidationError: options that do not fit; the config reports them by line.
        UserError: no such baseline, or one that cannot work in this search.
    """
    checked = options_class(name).model_validate(dict(options))
    check = getattr(BASELINES.get(name), "check", None)
    if check is not None:
        check(checked, facts)
    return checked


def start_baseline(name: str, options: Mapping[str, Any], known: Generation0) -> Iterator[Proposal | None]:
    """The proposals of a baseline."""
    return BASELINES.get(name)(replace(known, options=options_class(name).model_validate(dict(options))))


def known_source(key: str, name: str, facts: Facts) -> None:
    """Raise `UserError` unless an option names a source of the config."""
    if name not in facts.sources:
        raise UserError(f"{key}: no source is called '{name}'{nearest(name, facts.sources)}")


def parent_label(source: str) -> str:
    """The label of the candidate that is a source as it is."""
    return f"{PARENT}{source}"


def soup_rule(members: Mapping[str, float] | tuple[str, ...]) -> Rule:
    """A weighted sum of models; for names alone, their mean (Wortsman 2022, model soups)."""
    weights = dict(members) if isinstance(members, Mapping) else dict.fromkeys(members, 1.0)
    sources: dict[str, dict[str, Value]] = {name: {"weight": weight} for name, weight in weights.items()}
    return Rule(operator="linear", sources=sources)


def vectors_rule(weights: Mapping[str, float]) -> Rule:
    """The base plus a weighted sum of task vectors (Ilharco 2023); sources with weight 0 are left out."""
    sources: dict[str, dict[str, Value]] = {name: {"weight": weight} for name, weight in weights.items() if weight}
    return Rule(operator="task_arithmetic", sources=sources) if sources else soup_rule(("base",))


def parents_by_loss(known: Generation0) -> Generator[None, None, list[str]]:
    """Wait, by yielding None, until every parent's loss is known; returns the sources, best first.

    Among equals the order of the config decides.
    """
    losses: dict[str, float] = {}
    while len(losses) < len(known.sources):
        losses = {s: loss for s in known.sources if (loss := known.loss(parent_label(s))) is not None}
        if len(losses) < len(known.sources):
            yield None
    return sorted(known.sources, key=lambda source: losses[source])


def best_of(known: Generation0, labels: list[str]) -> Generator[None, None, str]:
    """Wait until these proposals are evaluated; returns the label of the best, the first among equals."""
    while any(known.loss(label) is None for label in labels):
        yield None
    return min(labels, key=lambda label: cast(float, known.loss(label)))

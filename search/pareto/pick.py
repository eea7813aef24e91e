"""Choosing one point of a front by words: `accuracy >= 0.9, min asr`, or `knee`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from search.errors import UserError, nearest
from search.pareto.front import Front, FrontPoint
from search.pareto.knee import knee

EXAMPLE = "such as 'accuracy >= 0.9, min asr', 'max accuracy' or 'knee'"

_NAME = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)?"
_BOUND = re.compile(rf"({_NAME})\s*(<=|>=|=<|=>|==|=|<|>)\s*(\S+)")
_GOAL = re.compile(rf"(min|max)\s+({_NAME})")


@dataclass(frozen=True)
class Bound:
    """`metric >= value` or `metric <= value`; the metric may be short."""

    metric: str
    relation: Literal["<=", ">="]
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.value:g}"

    def beyond(self, found: float) -> float:
        """By how much a value misses the bound, relative to it; 0 where it keeps it."""
        missed = found - self.value if self.relation == "<=" else self.value - found
        return max(missed, 0.0) / (abs(self.value) or 1.0)


@dataclass(frozen=True)
class Pick:
    """What is wanted of a front.

    Attributes:
        bounds: what the chosen point must keep.
        goal: what decides between those that do; `knee` knows no metric.
    """

    bounds: tuple[Bound, ...]
    goal: Literal["min", "max", "knee"]
    metric: str = ""


def parse_pick(text: str) -> Pick:
    """Read an expression: bounds and exactly one goal (`min metric`, `max metric` or `knee`), separated by commas.

    Raises:
        UserError: it is none.
    """
    bounds: list[Bound] = []
    goals: list[tuple[Literal["min", "max", "knee"], str]] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "knee":
            goals.append(("knee", ""))
        elif goal := _GOAL.fullmatch(part):
            goals.append(("min" if goal[1] == "min" else "max", goal[2]))
        elif bound := _BOUND.fullmatch(part):
            bounds.append(_bound(*bound.groups(), text=text))
        else:
            raise UserError(f"pick '{text}': cannot read '{part}'; expected bounds and one goal, {EXAMPLE}")
    if len(goals) != 1:
        found = "no goal" if not goals else f"{len(goals)} goals"
        raise UserError(f"pick '{text}': found {found}, expected exactly one of min, max and knee, {EXAMPLE}")
    return Pick(tuple(bounds), *goals[0])


def _bound(metric: str, relation: str, number: str, *, text: str) -> Bound:
    if relation not in ("<=", ">="):
        raise UserError(f"pick '{text}': '{relation}' is no relation of a bound; expected <= or >=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"pick '{text}': '{number}' is not a number; expected one after '{metric} {relation}'")
    return Bound(metric, "<=" if relation == "<=" else ">=", value)


def resolve(pick: Pick, metrics: Iterable[str]) -> Pick:
    """The expression with full names of metrics: a short one must belong to one evaluator only.

    Raises:
        UserError: no such metric, or several.
    """
    known = list(metrics)
    bounds = tuple(Bound(_full(bound.metric, known), bound.relation, bound.value) for bound in pick.bounds)
    return Pick(bounds, pick.goal, _full(pick.metric, known) if pick.metric else "")


def _full(name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    found = [full for full in known if full.partition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"metric '{name}' is given by {len(found)} evaluators; write one of {', '.join(found)}")
    raise UserError(
        f"no evaluator gives '{name}'{nearest(name, [*known, *(full.partition('.')[2] for full in known)])}"
    )


def choose(front: Front, pick: Pick) -> FrontPoint:
    """The point of a front that an expression with full names means; of those that are equally good at the goal
    the one with the smallest sum of losses, then the first candidate.

    Raises:
        UserError: the front is empty, or none of its points keeps the bounds; the message names the closest.
    """
    if not front.points:
        raise UserError("no candidate keeps the constraints of the run, so there is nothing to pick from")
    kept = [point for point in front.points if not _missed(point, pick)]
    if not kept:
        closest = min(front.points, key=lambda point: (_missed(point, pick), point.candidate))
        wanted = ", ".join(str(bound) for bound in pick.bounds)
        has = values(closest.metrics, [bound.metric for bound in pick.bounds])
        raise UserError(
            f"none of the {len(front.points)} points of the front on the {front.items} items keeps {wanted}; "
            f"the closest is trial {closest.candidate} ({closest.origin}) with {has}"
        )
    if pick.goal == "knee":
        return kept[knee(Front(front.items, front.metrics, tuple(kept)).losses())]
    sign = 1.0 if pick.goal == "min" else -1.0
    # Many have the same number of layers: of these the one that is best in all terms together.
    return min(kept, key=lambda point: (sign * point.metrics[pick.metric], sum(point.losses), point.candidate))


def _missed(point: FrontPoint, pick: Pick) -> float:
    return sum(bound.beyond(point.metrics[bound.metric]) for bound in pick.bounds)


def values(metrics: Mapping[str, float], names: Iterable[str]) -> str:
    """`accuracy 0.9, asr 0.1`, for people."""
    return ", ".join(f"{name} {metrics[name]:.6g}" for name in dict.fromkeys(names))

"""Scales that a baseline sweeps over, as a config writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

PAPER = tuple(round(0.05 * step, 2) for step in range(21))
"""0, 0.05 ... 1: the grid of task arithmetic (Ilharco 2023, https://arxiv.org/abs/2212.04089)."""


def _named(value: Any) -> Any:
    if isinstance(value, str) and value != "paper":
        raise ValueError(f"'{value}' is no list of numbers; expected numbers, or paper for 0, 0.05 ... 1")
    return PAPER if value == "paper" else value


def not_empty(values: tuple[float, ...]) -> tuple[float, ...]:
    """For validators. Not `min_length`, by which pydantic also finds a list too short whose items are wrong."""
    if not values:
        raise ValueError("the list is empty; give at least one number")
    return values


def _distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    shown = [f"{value:g}" for value in values]
    for index, text in enumerate(shown):
        if text in shown[:index]:
            raise ValueError(f"{text} stands twice")
    return values


Finite = Annotated[float, Field(allow_inf_nan=False)]
Distinct = Annotated[tuple[Finite, ...], AfterValidator(not_empty), AfterValidator(_distinct)]
"""Numbers to try, each once: a result is found by its label."""

Scales = Annotated[Distinct, BeforeValidator(_named)]
"""Numbers to try, or `paper`."""


def at_depth(curve: Sequence[float], depth: float) -> float:
    """The value of a curve at a depth from 0 (first layer) to 1 (last), linear between its evenly spaced values."""
    place = depth * (len(curve) - 1)
    index = min(int(place), len(curve) - 1)
    share = place - index
    return (1.0 - share) * curve[index] + share * curve[min(index + 1, len(curve) - 1)]

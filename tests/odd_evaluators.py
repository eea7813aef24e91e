"""Evaluators that break the contract, named by tests as `odd_evaluators:Class`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evaluators.base import Context, Evaluator, ItemPool, Metric, Scores


class _Ones(Evaluator):
    metrics = {"one": Metric("minimize")}  # noqa: RUF012 - as the API documents it

    def prepare(self, context: Context) -> None:
        pass

    def items(self, pool: ItemPool) -> Sequence[str]:
        return [f"{pool}-{i}" for i in range(4)]

    def _scores(self, items: Sequence[str]) -> Scores:
        return Scores(tuple(items), {"one": np.ones(len(items))}, np.ones(len(items)))


class Whole(_Ones):
    """Keeps the contract, in another order and in chunks."""

    def evaluate(self, model: Any, items: Sequence[str]) -> Iterator[Scores]:
        yield self._scores(items[2:])
        yield self._scores(items[:2])


class TooFew(_Ones):
    def evaluate(self, model: Any, items: Sequence[str]) -> Iterator[Scores]:
        yield self._scores(items[1:])


class Twice(_Ones):
    def evaluate(self, model: Any, items: Sequence[str]) -> Iterator[Scores]:
        yield self._scores([items[0], *items[:-1]])


class Nothing(_Ones):
    def evaluate(self, model: Any, items: Sequence[str]) -> Iterator[Scores]:
        yield from ()

"""An evaluator for tests that have the scores already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evaluators.base import Context, Evaluator, ItemPool, Metric, Scores


class Unscored(Evaluator):
    """Knows its items, of which there are so many in each pool, and is never asked to score."""

    metrics = {"loss": Metric("minimize")}  # noqa: RUF012

    def __init__(self, count: int = 0) -> None:
        super().__init__(None)
        self._count = count

    def prepare(self, context: Context) -> None: ...

    def items(self, pool: ItemPool) -> Sequence[str]:
        return [f"{pool}{k}" for k in range(self._count)]

    def evaluate(self, model: object, items: Sequence[str]) -> Iterator[Scores]:
        raise NotImplementedError

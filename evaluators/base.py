"""The evaluator API: everything that a plug-in author needs.

An evaluator turns a model and some items into per-item scores. Subclass `Evaluator`, declare
`metrics` and `Options`, and either put the module in this package, publish the class under the
entry point group `meiosis.evaluators`, or name it as `module:Class` in a config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

ItemPool = Literal["search", "select", "certify"]
ITEM_POOLS: tuple[ItemPool, ...] = get_args(ItemPool)
"""Search items drive the fitness, select items choose among the finalists, certify items are for the
number that is reported and are touched once. The three are disjoint."""


@dataclass(frozen=True)
class Metric:
    """What one number of an evaluator means.

    `low` and `high` bound the possible values (None: unbounded); `unit` is for people.
    """

    direction: Literal["minimize", "maximize"]
    unit: str = ""
    low: float | None = None
    high: float | None = None
    help: str = ""


@dataclass(frozen=True)
class Scores:
    """Per-item scores of a chunk of items, in the order of `items`.

    Attributes:
        items: (n,) ids of the items scored.
        values: metric name -> (n,) float64, one value per item.
        weights: (n,) float64, how much an item counts in the mean of its pool (for token-weighted
            likelihoods the number of scored tokens, otherwise ones).
    """

    items: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    weights: NDArray[np.float64]

    @staticmethod
    def join(chunks: Sequence[Scores]) -> Scores:
        """One block of scores from the chunks of one evaluation, in order."""
        if not chunks:
            return Scores((), {}, np.zeros(0))
        return Scores(
            items=tuple(item for chunk in chunks for item in chunk.items),
            values={
                name: np.concatenate([np.asarray(chunk.values[name], np.float64) for chunk in chunks])
                for name in chunks[0].values
            },
            weights=np.concatenate([np.asarray(chunk.weights, np.float64) for chunk in chunks]),
        )


@dataclass(frozen=True)
class Context:
    """What a worker tells its evaluators once, before the first candidate.

    Attributes:
        model_folder: checkpoint folder of the base model: config, tokenizer or image processor.
        device: torch device of the live model, such as `cpu` or `cuda:0`.
        seed: seed of the run; anything random in an evaluator derives from it.
    """

    model_folder: Path
    device: str = "cpu"
    seed: int = 0


class Options(BaseModel):
    """Base of an evaluator's options: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluator(ABC):
    """Scores a live model on items.

    Class attributes:
        metrics: metric name -> `Metric`. The config calls them `<evaluator>.<metric>`.
        Options: pydantic model of the keys that may stand beside `use` in the config.
        help: one line for `meiosis evaluators`.
        source: paper or origin of the method, may be empty.
        architectures: what the base must be to be scored, as suffixes of the class name in
            `config.json` (`ForCausalLM`); empty: anything.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    Options: ClassVar[type[Options]] = Options
    help: ClassVar[str] = ""
    source: ClassVar[str] = ""
    architectures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self) -> None:  # noqa: B027 - most evaluators have nothing to check
        """Look at the data without loading a model: files exist and parse, pools are disjoint.

        Runs in `meiosis plan` and before a search spends anything; must be quick and must not import
        torch. Raises `UserError` that names the file and the way out.
        """

    @abstractmethod
    def prepare(self, context: Context) -> None:
        """Once per worker: read data, load the tokenizer, remember the device."""

    @abstractmethod
    def items(self, pool: ItemPool) -> Sequence[str]:
        """Ids of the items of a pool, in a fixed order, after `prepare`. Ids are unique over pools."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        """Yield scores chunk by chunk for the given items, and leave the model as it was.

        The model is an ordinary module with the Hugging Face forward signature, in eval mode, under
        `torch.no_grad()`. How items are batched must depend on the items only, so that every worker
        returns the same bits.
        """

    def aggregate(self, scores: Scores) -> dict[str, float]:
        """Metrics of a pool from its per-item scores: weighted means unless overridden.

        An override makes the default confidence intervals wrong for that metric, so prefer per-item
        values whose weighted mean is the metric.
        """
        total = float(scores.weights.sum())
        if total <= 0:
            return {name: float("nan") for name in self.metrics}
        return {name: float(scores.values[name] @ scores.weights) / total for name in self.metrics}


@dataclass(frozen=True)
class EvaluatorSpec:
    """An evaluator as a config names it: plain data that travels to workers."""

    name: str
    use: str
    options: Mapping[str, object] = field(default_factory=dict)

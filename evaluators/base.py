"""The evaluator API: everything that a plug-in author needs.

An evaluator turns a model and some items into per-item scores. Subclass `Evaluator`, declare
`metrics` and `Options`, and either put the module in this package, publish the class under the
entry point group `meiosis.evaluators`, or name it as `module:Class` in a config.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo

if TYPE_CHECKING:
    import torch

ItemPool = Literal["search", "select", "certify"]
ITEM_POOLS: tuple[ItemPool, ...] = get_args(ItemPool)
"""Search items drive the fitness, select items choose among the finalists, certify items are for the
number that is reported and are touched once. The three are disjoint."""


@dataclass(frozen=True)
class Metric:
    """What one number of an evaluator means.

    `low` and `high` bound the possible values (None: unbounded); `unit` is for people. With `per_item`
    the metric is the weighted mean of the per-item values of the same name; without, `Scores` have no
    such values and `Evaluator.aggregate` computes it from others (perplexity from likelihoods).
    """

    direction: Literal["minimize", "maximize"]
    unit: str = ""
    low: float | None = None
    high: float | None = None
    help: str = ""
    per_item: bool = True


@dataclass(frozen=True)
class Scores:
    """Per-item scores of a chunk of items, in the order of `items`.

    Attributes:
        items: (n,) ids of the items scored.
        values: metric name -> (n,) float64, one value per item, for the metrics with `per_item`.
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


def absolute_path(path: Path, info: ValidationInfo) -> Path:
    """`path` as a config means it: from the folder of the config, or the working directory without one.

    For validators of options; `ConfigPath` is one. The folder comes with the validation context,
    `Options.model_validate(data, context={"folder": folder})`, as `make_evaluator` gives it. What was
    resolved is absolute, so options that were written out mean the same everywhere.
    """
    folder = (info.context or {}).get("folder") or Path()
    return (folder / path.expanduser()).resolve()


def _path_text(value: object) -> object:
    if not isinstance(value, (str, Path)):
        raise ValueError(f"{value!r} is not a path; expected text")
    if value == "":  # pydantic would read it as the current folder, which nobody means
        raise ValueError("the path is empty; write '.' for the folder of the config itself")
    return value


ConfigPath = Annotated[Path, BeforeValidator(_path_text), AfterValidator(absolute_path)]
"""Type of options that are paths: relative ones start at the folder of the config file."""


class Options(BaseModel):
    """Base of an evaluator's options: unknown keys are errors, values do not change.

    `model_dump(mode="json")` gives plain data that validates to equal options in any working directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluator(ABC):
    """Scores a live model on items.

    Class attributes:
        metrics: metric name -> `Metric`. The config calls them `<evaluator>.<metric>`. Where the options
            decide which there are, `__init__` sets an attribute of the instance; the class has the default.
        Options: pydantic model of the keys that may stand beside `use` in the config.
        help: one line for `meiosis evaluators`.
        source: paper or origin of the method, may be empty.
        architectures: what the base must be to be scored, as suffixes of the class name in
            `config.json` (`ForCausalLM`); empty: anything. Options may decide, as with `metrics`.
        loss_metric: the metric that `losses` gives with a gradient; empty: there is none.
        exact: whether the metrics are properties of the model, so that its items stand for nothing else.
        plain_forward: whether `evaluate` does no more with the model than to call it: it changes no weight, not even
            for a moment. Then what the first layers give for an input may be taken from an earlier candidate that has
            the same ones, with the same bits. May be set on the instance, where the options decide.
    """

    metrics: Mapping[str, Metric]
    Options: ClassVar[type[Options]] = Options
    help: ClassVar[str] = ""
    source: ClassVar[str] = ""
    architectures: tuple[str, ...] = ()
    loss_metric: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    plain_forward: bool = False

    def __init__(self, options: Any) -> None:
        """`options` is an instance of this class's `Options`; opens no files."""
        self.options = options

    def check(self) -> None:  # noqa: B027 - most evaluators have nothing to check
        """Look at the data without loading a model: files exist and parse, pools are disjoint.

        Runs in `meiosis plan` and before a search spends anything; must be quick and must not import
        torch. Raises `UserError` that names the file and the way out.
        """

    def files(self) -> Sequence[Path]:
        """Files and folders that are read while a worker prepares and evaluates.

        A worker on a node that does not see them gets copies, and options that name these instead. By default
        all paths among the options; whoever reads a file that no option of type `Path` names overrides this.
        """
        return tuple(dict.fromkeys(paths_in(self.options)))

    @abstractmethod
    def prepare(self, context: Context) -> None:
        """Once per worker: read data, load the tokenizer, remember the device."""

    @abstractmethod
    def items(self, pool: ItemPool) -> Sequence[str]:
        """Ids of the items of a pool, in a fixed order, unique over pools. Works without `prepare`."""

    def document_of(self, item: str) -> str:
        """What an item was taken from: items of one document are not independent of each other.

        Confidence intervals are over documents, and a document lies in one pool only. Works without
        `prepare`. By default every item is a document.
        """
        return item

    def data_sha256(self) -> str:
        """Hash of what is scored on, 64 hex digits, so that a resumed run notices other data.

        Works without `prepare` and without torch. By default that of the options, which is right for
        evaluators that read nothing; override it to cover contents.
        """
        text = json.dumps(self.options.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        """Yield scores chunk by chunk for the given items, and leave the model as it was.

        The model is an ordinary module with the Hugging Face forward signature, in eval mode, under
        `torch.no_grad()`. How items are batched must depend on the items only, so that every worker
        returns the same bits; in which order items come back is up to the evaluator.
        """

    def losses(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield, batch by batch, a summed loss that can be differentiated (scalar float32) and its weight.

        The sum of the losses over the sum of the weights is the metric called `loss_metric`; who declares
        that overrides this. The caller runs backward before it asks for the next batch, so that one
        batch of activations is alive at a time. The model gives what a Hugging Face model gives.
        """
        raise NotImplementedError

    def aggregate(self, scores: Scores) -> dict[str, float]:
        """Metrics of a pool from its per-item scores: weighted means, not a number without weight.

        Whoever declares metrics without `per_item` overrides this and adds them. It is called with
        resampled weights for confidence intervals (an item drawn twice weighs twice), so it must go by
        `weights` and be quick.
        """
        total = float(scores.weights.sum())
        per_item = [name for name, metric in self.metrics.items() if metric.per_item]
        if total <= 0:
            return {name: float("nan") for name in per_item}
        return {name: float((scores.values[name] * scores.weights).sum()) / total for name in per_item}


def paths_in(value: object) -> Iterator[Path]:
    """Every path among options, however deep."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from paths_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from paths_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from paths_in(part)


@dataclass(frozen=True)
class EvaluatorSpec:
    """An evaluator as a config names it: plain data that travels to workers."""

    name: str
    use: str
    options: Mapping[str, object] = field(default_factory=dict)

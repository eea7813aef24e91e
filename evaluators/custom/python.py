"""A user's own function on the model.

The function names what it wants of `model`, `tokenizer` (None if the base has none), `items`, `device` and
`seed`. Without `data` it returns one score of the model:

    def score(model):
        return float(model.get_input_embeddings().weight.std())

With `data`, JSONL in the usual pools, `items` are the JSON objects of one pool, and it returns or yields
a score for each, in their order. A score is a number or, for several metrics, `{name: number}`.

    def score(model, tokenizer, items, device):
        for item in items:
            tokens = tokenizer(item["prompt"], return_tensors="pt").to(device)
            yield float(model(**tokens).logits[0, -1].argmax() == item["next_token"])
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo

from evaluators.base import ITEM_POOLS, Context, Metric, Options, Scores, absolute_path
from evaluators.errors import MeiosisError, UserError, nearest
from evaluators.functions import check_function, load_function, parameters_of
from evaluators.items import Data, Item, ItemEvaluator, Items, PoolOptions
from evaluators.likelihood import scoring

if TYPE_CHECKING:
    import torch

ARGUMENTS = ("model", "tokenizer", "items", "device", "seed")


def _absolute(function: str, info: ValidationInfo) -> str:
    place, _, name = function.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"'{function}' does not name a function; expected path/to/file.py:name or module:name")
    return f"{absolute_path(Path(place), info)}:{name}" if place.endswith(".py") else function


class MetricOptions(Options):
    """What one number of the function means."""

    direction: Literal["minimize", "maximize"] = Field("maximize", description="which way is better")
    unit: str = Field("", description="for people")
    low: float | None = Field(None, description="smallest possible value")
    high: float | None = Field(None, description="largest possible value")
    help: str = Field("", description="one line")


MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class PythonOptions(PoolOptions):
    """Options of `python`."""

    function: Annotated[str, AfterValidator(_absolute)] = Field(
        description="path/to/file.py:name or module:name; may ask for model, tokenizer, items, device, seed"
    )
    data: Data | None = Field(
        None,
        description="JSONL, split into pools by document, or one for each pool; none: one score per model",
    )
    metrics: dict[MetricName, MetricOptions] = Field(
        {"score": MetricOptions()},
        min_length=1,
        validate_default=True,
        description="what the function returns: {name: {direction: maximize}}",
    )


class PythonFunction(ItemEvaluator):
    """Calls a function once per candidate and pool, without gradients and with the model in eval mode.

    Without `data` every pool has one item, named like the pool, that weighs 1: there is no confidence
    interval, and that certify items are independent of search items is up to the function (its item says
    `{"pool": "search"}`). A file is loaded by its path, and its folder is not on `sys.path`: code that
    several files share belongs in an installed module.
    """

    metrics: Mapping[str, Metric] = {"score": Metric("maximize", help="what the function returns")}
    Options = PythonOptions
    help = "Your own Python function on the model, per item of a JSONL file or once per model."
    options: PythonOptions

    def __init__(self, options: PythonOptions) -> None:
        super().__init__(options)
        self.metrics = {name: Metric(**metric.model_dump()) for name, metric in options.metrics.items()}

    def parse(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        content = {key: value for key, value in record.items() if key not in ("id", "document")}
        if not content:
            raise ValueError("an empty object, expected at least one key beside 'id' and 'document'")
        return content

    @cached_property
    def data(self) -> Items:
        """The items of the pools; without `data` one per pool."""
        if self.options.data is not None:
            return super().data
        return Items({pool: [Item(pool, pool, self.options.function, {"pool": pool})] for pool in ITEM_POOLS})

    def check(self) -> None:
        super().check()
        check_function(self.options.function, ARGUMENTS)

    def data_sha256(self) -> str:
        """Covers the file of the function too; what it imports is not covered."""
        parts = [self.options.function.rpartition(":")[2], self.data.sha256()]
        place = Path(self.options.function.rpartition(":")[0])
        if place.suffix == ".py":
            parts.append(hashlib.sha256(place.read_bytes()).hexdigest())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def files(self) -> Sequence[Path]:
        """The file of the function too; what it imports is not in it."""
        place = Path(self.options.function.rpartition(":")[0])
        return (*super().files(), *([place] if place.suffix == ".py" else []))

    def prepare(self, context: Context) -> None:
        self._function = load_function(self.options.function)
        wanted = parameters_of(self._function, ARGUMENTS, self.options.function)
        available: dict[str, Callable[[], Any]] = {
            "tokenizer": lambda: _tokenizer(context.model_folder),
            "device": lambda: context.device,
            "seed": lambda: context.seed,
        }
        self._arguments = {name: make() for name, make in available.items() if name in wanted}
        self._wants = wanted
        _ = self.data

    def evaluate(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Scores]:
        results = self._call(model, items)
        for item in items:
            with scoring(model):
                result = next(results, _END)
            if result is _END:
                raise self._fault(f"stopped before item '{item}'; {len(items)} items were given")
            values = self._values(result)
            yield Scores((item,), {name: np.array([value]) for name, value in values.items()}, np.ones(1))
        with scoring(model):
            if next(results, _END) is not _END:
                raise self._fault(f"returned more than the {len(items)} scores that there are items")

    def _call(self, model: torch.nn.Module, items: Sequence[str]) -> Iterator[Any]:
        """What the function returns, score by score; its exceptions say where they come from."""
        import torch

        found = [self.data[item] for item in items]
        # Copies: what the function does to its items must not reach the next candidate.
        records = [{"id": i.id, "document": i.document, **copy.deepcopy(dict(i.content))} for i in found]
        given = {"model": model, "items": records, **self._arguments}
        try:
            result = self._function(**{name: value for name, value in given.items() if name in self._wants})
            yield from [result] if _is_one(result) else self._iterate(result)
        except (torch.OutOfMemoryError, MemoryError, MeiosisError):
            raise
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__}: {error}") from error

    def _iterate(self, result: Any) -> Iterator[Any]:
        if not isinstance(result, Iterable) or isinstance(result, str):
            raise self._fault(
                f"returned {type(result).__name__}, expected a number, a mapping, or one of them per item"
            )
        yield from result

    def _values(self, result: Any) -> dict[str, float]:
        """Metric -> value, from a number or a mapping."""
        if not isinstance(result, Mapping):
            if len(self.metrics) > 1:
                raise self._fault(f"returned a single number, expected a mapping with {', '.join(self.metrics)}")
            result = {next(iter(self.metrics)): result}
        for name in result:
            if name not in self.metrics:
                raise self._fault(f"returned '{name}', which is not under `metrics`{nearest(str(name), self.metrics)}")
        if missing := [name for name in self.metrics if name not in result]:
            raise self._fault(f"returned no '{missing[0]}', which `metrics` declares")
        try:
            return {name: float(result[name]) for name in self.metrics}
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._fault(f"returned something that is not a number: {error}") from error

    def _fault(self, message: str) -> MeiosisError:
        return MeiosisError(f"function {self.options.function} {message}")


_END = object()


def _is_one(result: Any) -> bool:
    """Whether the function returned one score instead of one per item."""
    import torch

    return isinstance(result, (int, float, Mapping, np.generic)) or (
        isinstance(result, (torch.Tensor, np.ndarray)) and result.ndim == 0
    )


def _tokenizer(folder: Path) -> Any:
    from evaluators.tokens import load_tokenizer

    try:
        return load_tokenizer(folder)
    except UserError:
        return None


PLUGIN = PythonFunction

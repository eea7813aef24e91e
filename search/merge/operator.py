"""The operator API: one merge method, in two phases.

`prepare` computes, once per node, what depends on the sources alone (angles, norms, thresholds), as
small tensors that workers share through a file. `bind` turns the parameters of one candidate into a
function over blocks; the walk in `search.merge.apply` calls it block by block, in order, so that a
merge reads each source once and writes the output in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from search.recipe import Value

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements per block on the CPU: 1 MiB of float32, the measured optimum of eager torch."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator.

    Attributes:
        scope: `source` for one value per source model, `shared` for one value per tensor.
        kind: type of the value.
        default: value when the recipe gives none; None means that the recipe must give it.
        low, high: bounds that make sense for the method, both inclusive (None: unbounded).
        search: (low, high, initial) of the gene when a space searches it without saying bounds; None
            for parameters that are not searched unless asked for.
    """

    name: str
    scope: Literal["source", "shared"]
    kind: Literal["float", "int", "bool"]
    default: Value | None
    help: str
    low: float | None = None
    high: float | None = None
    search: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Block:
    """A contiguous range of the flattened tensor, in float32 on the device of the output.

    `base` and `sources` are for reading only: they may be views of the shared files.
    """

    start: int
    stop: int
    base: Tensor | None
    sources: tuple[Tensor, ...]


class Inputs(Protocol):
    """The sources of one output tensor, as an operator sees them."""

    name: str
    """Name of the tensor in the checkpoint."""
    models: tuple[str, ...]
    """Names of the sources, in the order of `Block.sources`."""
    shape: tuple[int, ...]
    seed: int
    """Seed of the recipe, for operators that draw masks."""

    @property
    def numel(self) -> int: ...

    def blocks(self) -> Iterator[Block]:
        """All blocks in order; each call is one pass over the sources."""
        ...


class Apply(Protocol):
    """Writes one block of the output (float32). Called for every block once, in order."""

    def __call__(self, block: Block, out: Tensor) -> None: ...


class Operator(ABC):
    """A merge method. Stateless: one instance serves every tensor and candidate.

    Class attributes:
        help: one line for `meiosis operators`.
        source: paper of the method.
        parameters: what a recipe may set.
        needs_base: whether task vectors are taken against `recipe.base`.
        min_sources, max_sources: how many sources it takes, the base not counted.
        prepares: whether `prepare` computes anything.
    """

    help: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    needs_base: ClassVar[bool]
    min_sources: ClassVar[int] = 1
    max_sources: ClassVar[int | None] = None
    prepares: ClassVar[bool] = False

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """Small CPU tensors that depend on the sources alone; `inputs.seed` must not matter."""
        return {}

    @abstractmethod
    def bind(
        self,
        inputs: Inputs,
        prepared: Mapping[str, Tensor],
        per_source: tuple[Mapping[str, Value], ...],
        shared: Mapping[str, Value],
    ) -> Apply:
        """The function that merges the blocks of this tensor with these parameters.

        Args:
            inputs: the tensor; more passes over it are allowed where the method needs them.
            prepared: what `prepare` returned for this tensor and these sources.
            per_source: one mapping per source, complete with defaults.
            shared: complete with defaults.
        """

"""The operator API: one merge method, in two phases.

`prepare` computes, once per node, what depends on the sources alone (angles, norms, count tables), as
small tensors that workers share through a file. `bind` turns the parameters of one candidate into a
function over blocks; the walk in `search.merge.apply` calls it block by block, in order, so that a
merge reads each source once and writes the output in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from search.recipe import Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from search.merge.kernels import Mode

BLOCK_ELEMENTS = 1 << 18
"""Elements per block on the CPU: 1 MiB of float32, the measured optimum of eager torch."""

ACCELERATOR_BLOCK_ELEMENTS = 1 << 24
"""Elements per block elsewhere: large enough that launching kernels costs nothing."""

ROW_ELEMENTS = 1 << 10
"""Blocks start at multiples of this, so that sums taken row by row do not depend on the block size."""

Prepares = Literal["nothing", "each_source", "all_sources"]


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
        step: a search rounds the gene to multiples of this (None: it does not). For parameters whose
            values on a grid merge faster, because what they need is prepared.
    """

    name: str
    scope: Literal["source", "shared"]
    kind: Literal["float", "int", "bool"]
    default: Value | None
    help: str
    low: float | None = None
    high: float | None = None
    search: tuple[float, float, float] | None = None
    step: float | None = None


@dataclass(frozen=True)
class Block:
    """A contiguous range of the flattened tensor, in `Inputs.dtype` on the device of the output.

    `base` and `sources` are one-dimensional, for reading only (they may be views of the shared files)
    and valid until the next block. `start` is a multiple of `ROW_ELEMENTS`.
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
    base: str | None
    """Name of the base, for operators that need one."""
    shape: tuple[int, ...]
    seed: int
    """Seed of the recipe, for operators that draw masks."""
    dtype: torch.dtype
    """What to compute in: float32, or float64 when an input is stored in that. Where the recipe says
    `compute: inputs`, what torch promotes the inputs to."""
    compute: Literal["float32", "inputs"]
    """As in the recipe: `inputs` asks for the numbers of mergekit."""
    device: torch.device
    kernels: Mode
    """Which kernels may be used."""
    depth: float | None
    """Where the tensor stands in the model: 0 in the first layer, 1 in the last of its stack, None outside
    of the layers."""
    cache: MutableMapping[Hashable, Any]
    """Small values kept between candidates, oldest dropped first. A key says all that the value depends
    on: operator, tensor, models, parameters. The models themselves do not change."""

    @property
    def numel(self) -> int: ...

    def blocks(self) -> Iterator[Block]:
        """All blocks in order; each call is one pass over the sources. May be left early."""
        ...

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Start and stop of all blocks, in order; reads nothing."""
        ...

    def whole(self, index: int | None) -> Tensor:
        """One source (None: the base) as a tensor of `shape`, in `dtype` on the device; for reading only.

        For methods that cannot go block by block (singular values, distances between rows). May be a
        view of the shared files, else it is newly allocated: as much memory as the tensor takes.
        """
        ...

    def statistics(self, kind: str, index: int) -> Tensor | None:
        """What was collected about one source for this tensor, such as its Fisher information; None where
        there is nothing for this tensor. Shapes are those that `kind` says (see `search.merge.statistics`)."""
        ...

    def scratch(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A one-dimensional buffer that holds one block, with arbitrary content, allocated once and
        handed out again for every tensor. By default in `dtype`; the same key is the same buffer."""
        ...


class Apply(Protocol):
    """Writes one block of the output (`Inputs.dtype`, or wider: `Operator.widens`). Called once a block, in order."""

    def __call__(self, block: Block, out: Tensor) -> None: ...


class Operator(ABC):
    """A merge method. Stateless: one instance serves every tensor and candidate.

    Modules that define one import torch inside its methods, because `meiosis operators` lists them.

    Class attributes:
        help: one line for `meiosis operators`.
        source: paper of the method.
        parameters: what a recipe may set.
        needs_base: whether task vectors are always taken against `recipe.base`.
        min_sources, max_sources: how many sources it takes, the base not counted.
        draws: whether `Inputs.seed` matters.
        widens: whether `Apply` writes float32 where `Inputs.dtype` has 16 bits.
        statistics: kind of statistics that every source must come with (`models.NAME.statistics`), if any.
        prepares: what `prepare` is called for: once for every source with that source alone, which
            serves all sets it appears in, or once for every set of sources.
        preparation_optional: whether `bind` also does with empty mappings for what `prepare` returns; a single
            merge then prepares nothing.
        prepared_version: raise it when `prepare` returns something else than before, so that files on
            disk are not mistaken.
    """

    help: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    needs_base: ClassVar[bool]
    min_sources: ClassVar[int] = 1
    max_sources: ClassVar[int | None] = None
    draws: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    statistics: ClassVar[str | None] = None
    prepares: ClassVar[Prepares] = "nothing"
    preparation_optional: ClassVar[bool] = False
    prepared_version: ClassVar[int] = 1

    def uses_base(self, shared: Mapping[str, Any]) -> bool:
        """Whether the base is read with these shared parameters; for methods that may go with or without one."""
        return self.needs_base

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        """Why parameters do not go together that are each within their bounds, and what to do; None where they do.

        Args:
            per_source: source -> its parameters, in the operator's order, complete with defaults.
            shared: complete with defaults.
        """
        return None

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """Small CPU tensors that depend on the sources alone; may be empty. No seed, no parameters."""
        return {}

    @abstractmethod
    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        """The function that merges the blocks of this tensor with these parameters.

        Args:
            inputs: the tensor; more passes over it are allowed where the method needs them.
            prepared: what `prepare` returned for this tensor: nothing, one mapping per source, or one
                mapping for all sources, as `prepares` says.
            per_source: one mapping per source, complete with defaults; passed `check`.
            shared: complete with defaults; passed `check`.
        """

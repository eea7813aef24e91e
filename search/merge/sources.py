"""Where tensors come from: anything with names and a way to get one tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """The tensors of one model. `search.checkpoints.reading.CheckpointTensors` reads them from files."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors, in a fixed order."""
        ...

    def get(self, name: str) -> Tensor:
        """A tensor, for reading only; raises KeyError if there is none of that name."""
        ...


class InMemoryTensors:
    """Tensors that are there already, such as a `state_dict`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

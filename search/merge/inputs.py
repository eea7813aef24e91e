"""The sources of one output tensor, read block by block without fresh memory."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from search.merge.kernels import Mode
from search.merge.operator import ROW_ELEMENTS, Block


class RecentValues(MutableMapping[Hashable, Any]):
    """A mapping of at most `limit` entries; the one unused for longest goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __getitem__(self, key: Hashable) -> Any:
        value = self._values[key]
        self._values.move_to_end(key)
        return value

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._values.popitem(last=False)

    def __delitem__(self, key: Hashable) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Scratch:
    """Buffers by name, allocated once: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, key: str, dtype: torch.dtype, device: torch.device, elements: int) -> Tensor:
        """(elements,) with arbitrary content; the next `get` of the same key shares its memory."""
        place = (key, dtype, device)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[place] = torch.empty(elements, dtype=dtype, device=device)
        return buffer[:elements]


class TensorInputs:
    """One output tensor's sources (implements `search.merge.operator.Inputs`).

    Args:
        sources: the sources' tensors, all of one shape, in the order of `models`.
        base_tensor: the base's tensor, where the operator needs it.
        block_elements: a multiple of `ROW_ELEMENTS`.
        compute, input_dtype: as in the recipe.
        depth: 0 in the first layer to 1 in the last, None outside.
        statistics: (kind, index of the source) -> what is known about its tensor.
        kernels: which kernels passes over the sources may use.
    """

    def __init__(
        self,
        *,
        name: str,
        models: tuple[str, ...],
        sources: tuple[Tensor, ...],
        base: str | None,
        base_tensor: Tensor | None,
        seed: int,
        device: torch.device,
        block_elements: int,
        scratch: Scratch,
        cache: MutableMapping[Hashable, Any],
        compute: Literal["float32", "inputs"] = "float32",
        input_dtype: torch.dtype | None = None,
        statistics: Callable[[str, int], Tensor | None] = lambda kind, index: None,
        depth: float | None = None,
        kernels: Mode = "auto",
    ) -> None:
        self.name, self.models, self.base, self.seed, self.device, self.cache = (
            name,
            models,
            base,
            seed,
            device,
            cache,
        )
        self.shape = tuple(sources[0].shape)
        every = [*sources] if base_tensor is None else [*sources, base_tensor]
        self.compute = compute
        self._rounding = input_dtype
        dtypes = [tensor.dtype for tensor in every] if input_dtype is None else [input_dtype]
        if compute == "inputs":
            self.dtype = functools.reduce(torch.promote_types, dtypes)
        else:
            self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.statistics, self.depth, self.kernels = statistics, depth, kernels
        self.bytes_read = 0
        self._flat = [tensor.reshape(-1) for tensor in sources]
        self._flat_base = None if base_tensor is None else base_tensor.reshape(-1)
        self._scratch = scratch
        rows = -(-self.numel // ROW_ELEMENTS)
        self._step = min(block_elements, max(1, rows) * ROW_ELEMENTS)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def ranges(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.numel, self._step):
            yield start, min(start + self._step, self.numel)

    def blocks(self) -> Iterator[Block]:
        for start, stop in self.ranges():
            yield Block(
                start,
                stop,
                None if self._flat_base is None else self._read("base", self._flat_base, start, stop),
                tuple(self._read(f"source {i}", flat, start, stop) for i, flat in enumerate(self._flat)),
            )

    def whole(self, index: int | None) -> Tensor:
        flat = self._flat_base if index is None else self._flat[index]
        assert flat is not None, "an operator that needs no base reads it"
        return self._counted(flat).to(self.device, self.dtype).view(self.shape)

    def scratch(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._scratch.get(f"operator {key}", dtype or self.dtype, self.device, self._step)

    def output(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Where a block of the output goes that cannot be computed in its place."""
        return self._scratch.get("output", dtype, self.device, self._step)[:elements]

    @property
    def stored(self) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
        """The sources and the base, flat, for who reads them as they are stored; None where they are rounded first."""
        every = self._flat if self._flat_base is None else [*self._flat, self._flat_base]
        if self._rounding is not None and any(tensor.dtype != self._rounding for tensor in every):
            return None
        return tuple(self._flat), self._flat_base

    def count_bytes(self, *tensors: Tensor) -> None:
        """Note that these were read by other ways than `blocks`."""
        self.bytes_read += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _read(self, key: str, flat: Tensor, start: int, stop: int) -> Tensor:
        part = self._counted(flat[start:stop])
        if part.dtype == self.dtype and part.device == self.device:
            return part
        return self._scratch.get(key, self.dtype, self.device, self._step)[: stop - start].copy_(part)

    def _counted(self, part: Tensor) -> Tensor:
        """What is read, rounded to the input dtype of the recipe."""
        self.bytes_read += part.numel() * part.element_size()
        rounds = self._rounding is not None and part.dtype != self._rounding
        return part.to(self._rounding) if rounds else part


def sum_of_weights(weights: Iterable[float], dtype: torch.dtype) -> float:
    """The sum of weights, rounded to `dtype` at each step: what a sum of tensors times weights divides by."""
    total = torch.zeros((), dtype=dtype)
    for weight in weights:
        total += torch.tensor(weight, dtype=dtype)
    return float(total)


def row_sums(values: Tensor) -> list[float]:
    """Sums of consecutive rows of `ROW_ELEMENTS`, in float64.

    Add them with `math.fsum`: the total then depends neither on the block size nor on threads.
    """
    whole = values.numel() // ROW_ELEMENTS * ROW_ELEMENTS
    sums: list[float] = values[:whole].view(-1, ROW_ELEMENTS).sum(1, dtype=torch.float64).tolist()
    if whole < values.numel():
        sums.append(float(values[whole:].sum(dtype=torch.float64)))
    return sums

"""Placebo models: the base plus a random change that is as large, tensor by tensor, as that of a fine-tune.

What a merge of such models gains, a search gains from noise: adapters with random weights were found to do about as
well as real ones (2026, https://arxiv.org/abs/2602.12323). They are made on the fly and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from search.memory_sizes import KEPT_PLACEBO_BYTES
from search.merge.inputs import row_sums
from search.merge.operator import ROW_ELEMENTS
from search.recipe import ModelRef
from search.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.sources import TensorSource

_STEP = 1024 * ROW_ELEMENTS


class Kept:
    """Tensors that were drawn before, up to so many bytes.

    The first that fit stay: merges read all tensors in turn, so that to drop the oldest would drop the next one.
    """

    def __init__(self, most_bytes: int = KEPT_PLACEBO_BYTES) -> None:
        self._left = most_bytes
        self._tensors: dict[tuple[int, str], Tensor] = {}

    def get(self, seed: int, name: str) -> Tensor | None:
        """The tensor, if it is here."""
        return self._tensors.get((seed, name))

    def put(self, seed: int, name: str, tensor: Tensor) -> None:
        """Keep a tensor if there is room."""
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._tensors[seed, name] = tensor


class RandomDelta:
    """The base plus a Gaussian direction with the L2 norm of `source - base` in every tensor.

    The direction of a tensor follows from the seed and its name alone: it is the same on every worker and device,
    whatever was read before. Numbers are float32 (float64 where a model has it), which an output rounds as it would
    those of the source. Tensors of whole numbers are those of the source.

    Args:
        source: the fine-tune; only the norms of its change are used.
        base: what it was tuned from, with the same names and shapes.
        kept: where drawn tensors are kept.
    """

    def __init__(self, source: TensorSource, base: TensorSource, seed: int, kept: Kept | None = None) -> None:
        self._source, self._base, self._seed = source, base, seed
        self._kept = Kept() if kept is None else kept
        self._norms: dict[str, float] = {}

    @property
    def names(self) -> Collection[str]:
        """Those of the source."""
        return self._source.names

    def get(self, name: str) -> Tensor:
        """A tensor, for reading only; raises KeyError if there is none of that name."""
        found = self._kept.get(self._seed, name)
        if found is None:
            found = self._made(name)
            self._kept.put(self._seed, name, found)
        return found

    def _made(self, name: str) -> Tensor:
        real = self._source.get(name)
        if not real.dtype.is_floating_point:
            return real
        base = self._base.get(name)
        wide = torch.float64 if torch.float64 in (real.dtype, base.dtype) else torch.float32
        made = base.to(wide, copy=True).contiguous()
        if name not in self._norms:
            self._norms[name] = _norm_of_difference(real, made)
        norm = self._norms[name]
        if norm:
            drawn = _drawn(self._seed, name, made.numel()).to(wide).view_as(made)
            # A product that is rounded before it is added: fused, the bits would depend on the processor.
            made.add_(drawn.mul_(norm / _norm(drawn)))
        return made


def with_random_deltas(
    tensors: Mapping[str, TensorSource], models: Mapping[str, ModelRef], base: str | None, kept: Kept | None = None
) -> Mapping[str, TensorSource]:
    """The models of a recipe, those with `random_delta` as placebos of what they are.

    Args:
        tensors: model name -> its tensors, all with the same names and shapes.
    """
    seeds = {name: ref.random_delta for name, ref in models.items() if ref.random_delta is not None}
    if not seeds:
        return tensors
    assert base is not None, "Recipe.check asks for a base"
    kept = Kept() if kept is None else kept
    return {
        name: RandomDelta(source, tensors[base], seeds[name], kept) if name in seeds else source
        for name, source in tensors.items()
    }


def _drawn(seed: int, name: str, elements: int) -> Tensor:
    """(elements,) standard normal float32, by a counter-based generator of this tensor alone (Philox, Salmon 2011)."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "random delta", name)))
    return torch.from_numpy(generator.standard_normal(elements, dtype=np.float32))


def _norm(values: Tensor) -> float:
    """L2 norm, the same for any number of threads."""
    flat = values.reshape(-1)
    steps = range(0, flat.numel(), _STEP)
    return math.sqrt(math.fsum(part for start in steps for part in row_sums(flat[start : start + _STEP].double() ** 2)))


def _norm_of_difference(real: Tensor, base: Tensor) -> float:
    ours, theirs, sums = real.reshape(-1), base.reshape(-1), []
    for start in range(0, ours.numel(), _STEP):
        part = slice(start, start + _STEP)
        sums += row_sums((ours[part].double() - theirs[part].double()) ** 2)
    return math.sqrt(math.fsum(sums))

"""The native kernels as Python calls them: which merges they can do, and on how many threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search.merge.count_table import MagnitudeTrim
from search.merge.kernels import Mode
from search.merge.kernels.library import TYPES, Program, Source, library
from search.merge.kernels.threads import run_in_parts
from search.merge.masks import LEVELS, CounterMask
from search.merge.narrow import NARROW, round_to
from search.merge.operator import Apply
from search.merge.task_vectors import ListedTrim, TaskVectors, Trim, drop_all, keep_all
from search.merge.weighted_sums import WeightedSum

MOST_SOURCES = 64

KEEP, MAGNITUDE, MASK, LISTED = 0, 1, 2, 3
_FUSED, _PLAIN, _SUM, _ELECT = 0, 1, 2, 3


class Stored(NamedTuple):
    """The sources of one output tensor and its base, flat, as they are stored."""

    sources: tuple[Tensor, ...]
    base: Tensor | None


class NativeMerge:
    """One tensor's merge as the kernels do it: `write` fills ranges of the output."""

    def __init__(self, code: ctypes.CDLL, program: Program, held: Sequence[Any]) -> None:
        self._merge = code.meiosis_merge_narrow if program.narrow else code.meiosis_merge
        self._program = program
        self._held = held  # what the program points to

    def write(self, start: int, stop: int, out: Tensor) -> None:
        """Merge elements [start, stop), `start` a multiple of 1024, into the contiguous `out`."""
        address, step, size = out.data_ptr(), out.element_size(), ctypes.addressof(self._program)

        def part(first: int, last: int) -> None:
            if self._merge(size, start + first, start + last, address + first * step):
                raise AssertionError("the native kernels were given a program that they do not know")

        run_in_parts(stop - start, part)


def plan(
    mode: Mode, apply: Apply, stored: Stored, target: torch.dtype, rounded: torch.dtype | None
) -> NativeMerge | None:
    """How the kernels do what `apply` does, or None where they cannot.

    Args:
        stored: flat tensors; those that lie elsewhere than on the CPU are left to torch.
        target: dtype of the output.
        rounded: dtype that results are rounded to first.
    """
    every = [*stored.sources] if stored.base is None else [*stored.sources, stored.base]
    known = all(one.dtype in TYPES and one.is_contiguous() and one.device.type == "cpu" for one in every)
    if not known or target not in TYPES or (rounded or target) not in TYPES or len(every) > MOST_SOURCES:
        return None
    if isinstance(apply, WeightedSum):
        program, sources = _weighted_sum(apply, stored)
    elif isinstance(apply, TaskVectors) and stored.base is not None:
        narrow = apply.inputs.dtype in NARROW
        trims = trim_kind(apply.trims)
        if trims is None or (narrow and trims == MAGNITUDE) or (apply.rescales_first and not narrow):
            return None
        program, sources = _task_vectors(apply, stored, stored.base, trims)
        if narrow:
            _round_to(apply.inputs.dtype, apply, program, sources)
    else:
        return None
    code = library(mode)
    if code is None:
        return None
    program.sources, program.count = sources, len(sources)
    program.type, program.rounded = TYPES[target], TYPES[rounded or target]
    return NativeMerge(code, program, (sources, apply, *every))


def _weighted_sum(apply: WeightedSum, stored: Stored) -> tuple[Program, Any]:
    sources = (Source * len(stored.sources))()
    for source, tensor, factor in zip(sources, stored.sources, apply.factors, strict=True):
        source.data, source.type, source.factor = tensor.data_ptr(), TYPES[tensor.dtype], factor
    program = Program(family=_FUSED if apply.fused else _PLAIN, divide=apply.divisor is not None, scale=1.0)
    program.divisor = 1.0 if apply.divisor is None else apply.divisor
    return program, sources


def _task_vectors(apply: TaskVectors, stored: Stored, base: Tensor, trim: int) -> tuple[Program, Any]:
    sources = (Source * len(stored.sources))()
    for index, source in enumerate(sources):
        one = apply.trims[index]
        # What a density of 0 leaves is the difference of the base from itself.
        tensor = base if drops_all(one) else stored.sources[index]
        source.data, source.type = tensor.data_ptr(), TYPES[tensor.dtype]
        source.factor, source.weight = apply.factors[index], apply.weights[index]
        source.level = LEVELS
        setattr(source, "from", -1.0)
        source.above, source.last = -1.0, -1
        if isinstance(one, CounterMask) and one.level:
            source.level, source.key = one.level, one.key
        elif isinstance(one, MagnitudeTrim) and one.trims:
            setattr(source, "from", one.bound)
            source.above, source.last = one.value, one.last
        elif isinstance(one, ListedTrim):
            source.dropped = one.dropped.data_ptr()
    program = Program(family=_ELECT if apply.elects else _SUM, trim=trim, divide=apply.divides)
    program.divisor, program.scale = apply.divisor, apply.scale
    program.base, program.base_type = base.data_ptr(), TYPES[base.dtype]
    return program, sources


def _round_to(dtype: torch.dtype, apply: TaskVectors, program: Program, sources: Sequence[Source]) -> None:
    """Make it a program that rounds at every step, as `search.merge.narrow` does."""
    for source, factor, weight, rescale in zip(sources, apply.factors, apply.weights, apply.rescales, strict=True):
        source.weight, source.rescale = round_to(weight, dtype), round_to(rescale, dtype)
        source.factor = round_to(factor, dtype) if rescale == 1.0 else source.weight
    program.divisor, program.narrow = round_to(apply.divisor, dtype), TYPES[dtype]


def drops_all(trim: Trim) -> bool:
    """Whether nothing of a task vector is left."""
    return trim is drop_all or (isinstance(trim, CounterMask) and trim.level == 0)


def trim_kind(trims: Sequence[Trim]) -> int | None:
    """The kind of trim that serves all sources; None if there is none that the kernels know."""
    kinds = set()
    for trim in trims:
        if trim is keep_all or trim is drop_all:
            continue
        if isinstance(trim, CounterMask):
            kinds.add(MASK)
        elif isinstance(trim, MagnitudeTrim):
            kinds.add(MAGNITUDE)
        elif isinstance(trim, ListedTrim):
            kinds.add(LISTED)
        else:
            return None
    return None if len(kinds) > 1 else kinds.pop() if kinds else KEEP

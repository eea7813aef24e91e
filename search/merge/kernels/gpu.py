"""The Triton kernels as Python calls them: which merges they can do, where there are any."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from search.errors import UserError
from search.merge.count_table import MagnitudeTrim
from search.merge.kernels import Mode
from search.merge.kernels.native import KEEP, LISTED, MAGNITUDE, MASK, Stored, drops_all, trim_kind
from search.merge.masks import LEVELS, CounterMask
from search.merge.narrow import NARROW
from search.merge.operator import ROW_ELEMENTS, Apply
from search.merge.task_vectors import TaskVectors
from search.merge.weighted_sums import WeightedSum

MOST_SOURCES = 8
"""Merges of more go block by block in plain torch."""

_ROUNDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EVERY_MAGNITUDE, _NO_MAGNITUDE = -1, -2


class TritonMerge:
    """One tensor's merge as the kernels do it: `write` fills ranges of the output."""

    def __init__(self, kernel: Any, arguments: Sequence[Any], constants: dict[str, Any], device: torch.device) -> None:
        self._kernel, self._arguments, self._constants, self._device = kernel, arguments, constants, device

    def write(self, start: int, stop: int, out: Tensor) -> None:
        """Merge elements [start, stop), `start` a multiple of 1024, into the contiguous `out`."""
        if start == stop:
            return
        grid = (-(-(stop - start) // ROW_ELEMENTS),)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            self._kernel[grid](_raw(out), start, stop - start, *self._arguments, **self._constants)


def plan(
    mode: Mode,
    apply: Apply,
    stored: Stored,
    target: torch.dtype,
    rounded: torch.dtype | None,
    device: torch.device,
) -> TritonMerge | None:
    """How the kernels do what `apply` does, or None where they cannot.

    Args:
        stored: flat tensors.
        target: dtype of the output.
        rounded: dtype that results are rounded to first.
        device: where the output is; sources that lie elsewhere are left to torch, which copies them block by block.

    Raises:
        UserError: `native` was asked for and Triton cannot be used.
    """
    every = [*stored.sources] if stored.base is None else [*stored.sources, stored.base]
    known = all(one.dtype in _ROUNDED and one.is_contiguous() and one.device == device for one in every)
    if not known or target not in _ROUNDED or (rounded or target) not in _ROUNDED:
        return None
    if len(stored.sources) > MOST_SOURCES:
        return None
    constants: dict[str, Any] = {"COUNT": len(stored.sources), "BLOCK": ROW_ELEMENTS, "num_warps": 4}
    constants["ROUNDED"] = 0 if rounded in (None, target) else _ROUNDED[rounded or target]
    constants["enable_fp_fusion"] = False
    arguments: list[Any]
    if isinstance(apply, WeightedSum):
        name, arguments = "weighted_sum", _weighted_sum(apply, stored)
        constants |= {"FUSED": apply.fused, "DIVIDE": apply.divisor is not None}
    elif isinstance(apply, TaskVectors) and stored.base is not None and not apply.rescales_first:
        trim = trim_kind(apply.trims)
        if trim in (None, LISTED) or apply.inputs.dtype in NARROW:
            return None
        if trim == KEEP and any(map(drops_all, apply.trims)):
            trim = MASK
        name, arguments = "task_vectors", _task_vectors(apply, stored, stored.base, trim)
        constants |= {"ELECTS": apply.elects, "DIVIDE": apply.divides, "TRIM": trim}
    else:
        return None
    kernels = triton_kernels(mode, device)
    return None if kernels is None else TritonMerge(getattr(kernels, name), arguments, constants, device)


@functools.cache
def triton_kernels(mode: Mode, device: torch.device) -> Any | None:
    """The module of the kernels, seen to run on this device; None where plain torch is to be used, which is said once
    if nobody asked for it.

    Raises:
        UserError: `native` was asked for and cannot be had.
    """
    if mode == "torch":
        return None
    try:
        from search.merge.kernels import triton_kernels as found

        probe = torch.ones(1, device=device)
        constants = {"COUNT": 1, "BLOCK": ROW_ELEMENTS, "FUSED": False, "DIVIDE": False, "ROUNDED": 0}
        arguments = [*[probe] * MOST_SOURCES, *[2.0] * MOST_SOURCES, 1.0]
        TritonMerge(found.weighted_sum, arguments, constants, device).write(0, 1, probe)
        if probe.item() != 2.0:
            raise RuntimeError("Triton computes wrong numbers")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises, it is a reason to do without
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if mode == "native":
            raise UserError(f"MEIOSIS_KERNELS=native: Triton cannot be used on {device}: {reason}") from error
        warnings.warn(
            f"merges on {device} run in plain torch, several times slower than Triton kernels: {reason}; "
            "MEIOSIS_KERNELS=torch says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found


def _raw(tensor: Tensor) -> Tensor:
    """As the kernels take it: bfloat16 as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _filled(values: Sequence[Any]) -> list[Any]:
    """One for each source that a kernel could have; those beyond the last are not looked at."""
    return [*values, *[values[0]] * (MOST_SOURCES - len(values))]


def _weighted_sum(apply: WeightedSum, stored: Stored) -> list[Any]:
    sources = [_raw(source) for source in stored.sources]
    factors = [float(factor) for factor in apply.factors]  # an int would be a number of another type
    return [*_filled(sources), *_filled(factors), 1.0 if apply.divisor is None else float(apply.divisor)]


def _task_vectors(apply: TaskVectors, stored: Stored, base: Tensor, trim: int) -> list[Any]:
    bounds, numbers = [], []
    for one in apply.trims:
        bound, number = -1.0, _EVERY_MAGNITUDE
        if trim == MASK:
            bound, number = float(LEVELS), 0
            if drops_all(one):
                bound = 0.0
            elif isinstance(one, CounterMask):
                bound, number = float(one.level), one.key - (one.key >> 63 << 64)  # the int64 of the same bits
        elif trim == MAGNITUDE:
            if drops_all(one):
                number = _NO_MAGNITUDE
            elif isinstance(one, MagnitudeTrim) and one.trims:
                bound, number = one.value, one.last
        bounds.append(bound)
        numbers.append(number)
    sources = [_raw(source) for source in stored.sources]
    factors, weights = ([float(one) for one in values] for values in (apply.factors, apply.weights))
    each = [*map(_filled, (sources, factors, weights, bounds, numbers))]
    return [_raw(base), *(value for values in each for value in values), float(apply.divisor), float(apply.scale)]

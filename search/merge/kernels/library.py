"""The native library: loaded once per process, and what it is called with."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import torch

from search.errors import UserError
from search.merge.kernels import Mode
from search.merge.kernels.build import NoKernelsError, built

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Source(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dropped", ctypes.c_void_p),
        ("key", ctypes.c_uint64),
        ("last", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("level", ctypes.c_uint32),
        ("from", ctypes.c_float),
        ("above", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("weight", ctypes.c_float),
        ("rescale", ctypes.c_float),
        ("rounded", ctypes.c_int32),
    )


class Program(ctypes.Structure):
    _fields_ = (
        ("sources", ctypes.POINTER(Source)),
        ("base", ctypes.c_void_p),
        ("base_type", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("family", ctypes.c_int32),
        ("trim", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("divisor", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("rounded", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("narrow", ctypes.c_int32),
    )


@functools.cache
def library(mode: Mode) -> ctypes.CDLL | None:
    """The kernels; None where plain torch is to be used, which is said once if nobody asked for it.

    Raises:
        UserError: `native` was asked for and cannot be had.
    """
    if mode == "torch":
        return None
    try:
        loaded = ctypes.CDLL(str(built()))
    except (NoKernelsError, OSError) as reason:
        if mode == "native":
            raise UserError(f"MEIOSIS_KERNELS=native: {reason}") from reason
        warnings.warn(
            f"merges run in plain torch, several times slower than native kernels: {reason}; "
            "MEIOSIS_KERNELS=torch says that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    difference: list[Any] = [pointer, pointer, ctypes.c_int32]  # a source, the base and its type
    loaded.meiosis_merge.argtypes = loaded.meiosis_merge_narrow.argtypes = [pointer, whole, whole, pointer]
    loaded.meiosis_sorted.argtypes = [pointer, whole, whole, whole, ctypes.c_int32, pointer]
    loaded.meiosis_largest_of.argtypes = [pointer, whole, whole, pointer]
    loaded.meiosis_count.argtypes = [*difference, whole, whole, ctypes.c_int32, pointer]
    loaded.meiosis_count.restype = None
    loaded.meiosis_find.argtypes = [*difference, whole, ctypes.c_uint32, whole]
    loaded.meiosis_find.restype = whole
    loaded.meiosis_largest.argtypes = [*difference, whole, whole]
    loaded.meiosis_largest.restype = ctypes.c_float
    bits = ctypes.c_uint32
    loaded.meiosis_collect.argtypes = [*difference, whole, whole, bits, bits, whole, pointer, pointer]
    loaded.meiosis_collect.restype = whole
    loaded.meiosis_list.argtypes = [*difference, whole, whole, ctypes.c_uint64, ctypes.c_uint64, pointer]
    loaded.meiosis_list.restype = None
    loaded.meiosis_mask_sums.argtypes = [*difference, whole, whole, ctypes.c_double, pointer]
    loaded.meiosis_mask_sums.restype = None
    return loaded

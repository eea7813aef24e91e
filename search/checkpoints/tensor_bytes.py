"""Live tensors as safetensors sees them: the name of the dtype and the bytes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""Name of a dtype in safetensors -> its name in torch and in `config.json`."""


@cache
def _names() -> dict[torch.dtype, str]:
    import torch

    # float8_e8m0fnu came with torch 2.7.
    return {getattr(torch, theirs): ours for ours, theirs in TORCH_NAMES.items() if hasattr(torch, theirs)}


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as safetensors writes it.

    Raises:
        ValueError: safetensors has no such dtype (complex128, packed and quantised ones).
    """
    name = _names().get(tensor.dtype)
    if name is None:
        raise ValueError(f"{tensor.dtype} cannot be written to safetensors; there is {', '.join(TORCH_NAMES)}")
    return name


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order, without a copy where the tensor is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())

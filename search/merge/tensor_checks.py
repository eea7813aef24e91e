"""What the inputs of one merged tensor must have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from search.errors import CheckpointError, RecipeError

MERGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that tensors are read from and written to."""


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_shapes(name: str, tensors: Mapping[str, Tensor], wanted: tuple[int, ...]) -> None:
    """Raise `CheckpointError` for an input whose shape is not that of the output."""
    for model, tensor in tensors.items():
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"tensor '{name}' of model '{model}' has shape {list(tensor.shape)}, expected {list(wanted)} "
                "as in the output; models of other sizes or vocabularies cannot be merged"
            )


def check_dtypes(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for an input in a type that is not blended: fp8, integers among floats."""
    for model, tensor in tensors.items():
        if tensor.dtype not in MERGED_DTYPES:
            raise CheckpointError(
                f"tensor '{name}' of model '{model}' is stored as {_plain(tensor.dtype)}, which "
                "cannot be merged yet; convert the model to bfloat16 or float32 first"
            )


def copy_identical(name: str, tensors: Mapping[str, Tensor], target: Tensor) -> int:
    """Counters and index buffers: nothing to blend, so they must be the same in all inputs.

    Returns the bytes read. Raises `RecipeError` that names the tensor where two inputs differ.
    """
    (first, values), *others = tensors.items()
    for model, other in others:
        if other.dtype != values.dtype or not torch.equal(other, values):
            raise RecipeError(
                f"tensor '{name}' is {_plain(values.dtype)} and differs between '{first}' and '{model}'; "
                "it cannot be blended: give it a rule of its own with one source"
            )
    target.copy_(values)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

"""Devices by name, as a user gives them."""

from __future__ import annotations

from search.errors import UserError


def usable_device(name: str) -> str:
    """`auto` as the device that is there; any other name as it is, if this process can use it.

    Raises:
        UserError: no such device, or none here.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).tolist()  # `meta` can be made, but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        raise UserError(f"device '{name}': cannot be used here; expected cpu, or auto for what there is") from error
    return name

"""Devices by name, as a user gives them."""

from __future__ import annotations

from search.errors import MeiosisError, UserError


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


def worker_devices(device: str, gpus: float = 1) -> tuple[str, ...]:
    """The devices of a worker's live model: one, or the GPUs that it is laid over.

    Args:
        device: of the config, see `resolve_device`.
        gpus: GPUs that the worker has for itself; less than 2 is one.

    Raises:
        MeiosisError: the config asks for GPUs and this worker does not see them.
    """
    found = resolve_device(device)
    if gpus < 2 or found != "cuda":
        return (found,)
    import torch

    seen = torch.cuda.device_count()
    if seen < gpus:
        raise MeiosisError(
            f"cluster.gpus_per_worker is {gpus:g} but this worker sees {seen} GPU{'s' * (seen != 1)}; set it to what "
            "one node has for a worker, and leave CUDA_VISIBLE_DEVICES to Ray"
        )
    return tuple(f"cuda:{index}" for index in range(int(gpus)))


def resolve_device(device: str) -> str:
    """`auto` as the device that is there; a device that is asked for and not there is an error.

    Raises:
        MeiosisError: the config asks for a GPU and this worker sees none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MeiosisError(
            f"cluster.device is '{device}' but this worker sees no CUDA device; set cluster.device to cpu or auto, "
            "or cluster.gpus_per_worker so that Ray gives it one"
        )
    return device

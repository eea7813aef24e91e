"""A live model laid over several devices, for models larger than one GPU.

A model is cut into consecutive parts, one for each device, and never inside a block: what a block computes is used
by its own residual connections. accelerate's hooks move what goes from one part to the next. Where the cuts are is
decided here and not by accelerate's `infer_auto_device_map`, which keeps room on the first GPU for layers that it
takes off the others, and sends what does not fit to main memory or disk: here everything is on a GPU, or it is refused.

The arithmetic of a tensor does not depend on which of several equal GPUs does it, so scores and hashes do not either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from search.errors import UserError
from search.memory_sizes import WORK_SPACE_BYTES, gib

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """What of a model is where.

    Attributes:
        devices: torch devices, in the order of the model. The first is where inputs go and outputs come from.
        places: module, or tensor that belongs to none of these modules -> number of its device.
        nbytes: bytes of the model on each device.
    """

    devices: tuple[str, ...]
    places: dict[str, int]
    nbytes: tuple[int, ...]

    @property
    def device_map(self) -> dict[str, str]:
        """As accelerate and transformers write it: module -> device."""
        return {name: self.devices[place] for name, place in self.places.items()}

    def as_data(self) -> dict[str, Any]:
        """For the log of a run."""
        bytes_on = dict.fromkeys(self.devices, 0)
        for device, nbytes in zip(self.devices, self.nbytes, strict=True):
            bytes_on[device] += nbytes
        return {"device_map": self.device_map, "bytes": bytes_on}


def plan_layout(model: torch.nn.Module, devices: Sequence[str], room: Sequence[int]) -> Layout:
    """The layout whose fullest device is as empty as can be; the same for the same model wherever there is room.

    Args:
        model: of transformers, on any device; its class says which blocks are not to be split.
        room: bytes that the model may take on each of the devices.

    Raises:
        UserError: it does not fit, or its class does not say how it may be split.
    """
    parts = _parts(model)
    total = sum(part.nbytes for part in parts)
    fullest = _smallest(parts, room, total)
    if fullest is None:
        raise UserError(_does_not_fit(type(model).__name__, parts, room))
    chosen = _fill(parts, room, fullest)
    assert chosen is not None
    nbytes = [0] * len(devices)
    for part, device in zip(parts, chosen, strict=True):
        nbytes[device] += part.nbytes
    where = {name: device for part, device in zip(parts, chosen, strict=True) for name in part.names}
    return Layout(tuple(devices), where, tuple(nbytes))


def room_on(devices: Sequence[str], reserved: int | None) -> tuple[int, ...]:
    """Bytes that a model may take on every device.

    Args:
        reserved: bytes that are to be left, such as for activations; None: a tenth of what is free.
    """
    found = []
    for device in devices:
        free = _free_bytes(device)
        left = free // 10 if reserved is None else reserved + WORK_SPACE_BYTES
        found.append(max(0, free - left))
    return tuple(found)


def lay_out(model: torch.nn.Module, layout: Layout) -> None:
    """Move a model to its places, with hooks that move its inputs; tied weights stay tied.

    State dict and signature of the model stay as they are, and a deep copy is a model of its own.
    """
    device_map = layout.device_map
    # Moved by torch, which leaves parameters the objects that they are: accelerate makes others, ties these again, and
    # moves modules alone, not what a module that is split has beside its children.
    for module_name, module in model.named_modules():
        if module_name in device_map:
            module.to(device_map[module_name])
        for name, tensor in _own(module):
            device = device_map.get(f"{module_name}.{name}" if module_name else name)
            if device is not None:
                tensor.data = tensor.data.to(device)
    add_hooks(model, layout)


def add_hooks(model: torch.nn.Module, layout: Layout) -> None:
    """Give a model whose tensors are at their places the hooks that move what it computes from one to the next."""
    from accelerate import dispatch_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match")  # the same tensors
        dispatch_model(
            model,
            layout.device_map,
            main_device=layout.devices[0],
            # Caches are made layer by layer, each where its layer is.
            skip_keys=getattr(model, "_skip_keys_device_placement", None),
            force_hooks=True,
        )
    # accelerate puts warnings over these, which would move this model when they are called on a copy of it.
    for name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"):
        model.__dict__.pop(name, None)


@dataclass
class _Part:
    """What stays together.

    Attributes:
        first: whether it must be on the first device.
    """

    names: list[str] = field(default_factory=list)
    nbytes: int = 0
    first: bool = False


class _Piece(NamedTuple):
    name: str
    tensors: tuple[torch.Tensor, ...]
    loose: bool


def _parts(model: torch.nn.Module) -> list[_Part]:
    """The blocks of a model in order, those that share tensors (tied weights) in one.

    Raises:
        UserError: transformers does not say what a block is.
    """
    blocks = frozenset(getattr(model, "_no_split_modules", None) or ())
    if not blocks:
        raise UserError(
            f"cluster.gpus_per_worker: transformers does not say where a {type(model).__name__} may be split, so it "
            "cannot be laid over several GPUs; set cluster.gpus_per_worker to 1 or less"
        )
    loose = _Part(first=True)
    parts: list[_Part] = [loose]
    holder: dict[int, _Part] = {}
    for piece in _pieces(model, "", blocks):
        sharing = [holder[id(tensor)] for tensor in piece.tensors if id(tensor) in holder]
        sharing += [loose] * piece.loose
        part = next((part for part in parts if any(part is one for one in sharing)), None)  # the first of them
        if part is None:
            parts.append(part := _Part())
        for other in sharing:
            if other is not part and any(other is one for one in parts):
                part.names += other.names
                part.nbytes += other.nbytes
                parts = [one for one in parts if one is not other]
                holder = {key: part if held is other else held for key, held in holder.items()}
        part.names.append(piece.name)
        for tensor in piece.tensors:
            if id(tensor) not in holder:
                holder[id(tensor)] = part
                part.nbytes += tensor.nbytes
    return parts if loose.names else parts[1:]


def _pieces(module: torch.nn.Module, name: str, blocks: frozenset[str]) -> Iterator[_Piece]:
    """Blocks, modules without children, and tensors that modules which are split have beside them."""
    children = list(module.named_children())
    if name and (not children or type(module).__name__ in blocks):
        tensors = (*module.parameters(), *module.buffers())
        if tensors:  # where a module without any computes does not matter
            yield _Piece(name, tensors, False)
        return
    prefix = f"{name}." if name else ""
    for own, tensor in _own(module):
        yield _Piece(prefix + own, (tensor,), True)
    for child, inside in children:
        yield from _pieces(inside, prefix + child, blocks)


def _own(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _fill(parts: Sequence[_Part], room: Sequence[int], most: int) -> list[int] | None:
    """Device of every part, filled one after the other with up to `most` bytes; None if they do not suffice."""
    device, used = 0, 0
    found = []
    for part in parts:
        while used + part.nbytes > min(room[device], most):
            device, used = device + 1, 0
            if part.first or device == len(room):
                return None
        used += part.nbytes
        found.append(device)
    return found


def _smallest(parts: Sequence[_Part], room: Sequence[int], total: int) -> int | None:
    """The smallest number of bytes on the fullest device; None if nothing fits."""
    low, high = 0, total
    if _fill(parts, room, high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        if _fill(parts, room, middle) is None:
            low = middle + 1
        else:
            high = middle
    return high


def _does_not_fit(name: str, parts: Sequence[_Part], room: Sequence[int]) -> str:
    """Why, and how many GPUs of this size would do."""
    total, largest = sum(part.nbytes for part in parts), max(part.nbytes for part in parts)
    enough = (n for n in range(len(room) + 1, len(room) + len(parts) + 1))
    count = next((n for n in enough if _fill(parts, [max(room)] * n, total) is not None), None)
    smaller = "cluster.dtype to bfloat16, or batch_tokens of the evaluators to less"
    way_out = (
        f"its largest block takes {gib(largest)}: set {smaller}"
        if count is None
        else f"set cluster.gpus_per_worker to {count} where GPUs are as large as these, or {smaller}"
    )
    return (
        f"cluster.gpus_per_worker: the live {name} takes {gib(total)}, and {len(room)} GPUs have room for "
        f"{', '.join(map(gib, room))} beside activations; {way_out}"
    )


def _free_bytes(device: str) -> int:
    """Bytes that this process can still allocate on a device."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        # What torch holds and nothing lives in is to be had as well.
        held = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + int(held)
    from search.machine import make_probe

    memory: int = make_probe()(())["memory"]
    return memory

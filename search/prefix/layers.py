"""The stack of layers of a live model, and what of the model is used before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from search.prefix.contents import Place

_INSTALLED_BY_TRANSFORMERS = "install_output_capuring_hook"
"""Where hooks come from that transformers leaves on layers after it was once asked for hidden states; they do nothing
unless it is asked again."""


def find_layers(model: nn.Module) -> nn.ModuleList | None:
    """The one list of layers through which everything goes; None where there is none, or more than one."""
    stacks = [stack for stack in _outer_lists(model) if len(stack) and any(True for _ in stack.parameters())]
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if len(stacks) > 1 and not getattr(config, "is_encoder_decoder", False):
        stacks = [stack for stack in stacks if len(stack) == count]
    return stacks[0] if len(stacks) == 1 else None


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outer_lists(child)


def outer_modules(model: nn.Module, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """The modules that belong to no layer, by name."""
    inside = set(map(id, layers.modules()))
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def places_of(
    model: nn.Module, layers: nn.ModuleList, after: frozenset[str], targets: Mapping[str, Tensor]
) -> dict[str, Place]:
    """Where in the forward pass the tensors of a checkpoint are used first.

    Args:
        after: names of the modules that are called after the last layer only.
        targets: tensor of the checkpoint -> where it lives in the model, see `LiveModel.targets`.
    """
    number_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    rank: dict[int, int] = {}  # memory -> -1 before the layers, the number of a layer, or their number
    for name, module in model.named_modules(remove_duplicate=False):
        place = number_of.get(id(module), len(layers) if name in after else -1)
        for tensor in _own_tensors(module).values():
            memory = tensor.untyped_storage().data_ptr()
            rank[memory] = min(rank.get(memory, place), place)  # tied weights are used in several places
    found: dict[str, Place] = {}
    for name, target in targets.items():
        place = rank.get(target.untyped_storage().data_ptr(), -1)
        found[name] = "before" if place < 0 else "after" if place == len(layers) else place
    return found


def state_of(model: nn.Module) -> tuple[object, ...] | None:
    """What must be as it was for hidden states to be taken over; None where somebody looks into or changes the pass.

    Cheap enough for every forward pass: no bits are read. Writes through `.data` are not seen.
    """
    seen: list[object] = [_arithmetic(model)]
    if any(getattr(nn.modules.module, name, None) for name in _GLOBAL_HOOKS):
        return None
    for module in model.modules():
        own = vars(module)
        if own["training"] or _is_watched(own):
            return None
        if "forward" in own and "_hf_hook" not in own:  # that of accelerate moves inputs between devices
            return None
        seen.append(id(module))
        for tensor in _own_tensors(module).values():
            seen += (id(tensor), tensor.data_ptr(), tensor._version)
    return tuple(seen)


_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class OwnHook:
    """Base of the hooks of this package: on a copy of the model they do nothing."""

    def __deepcopy__(self, memo: object) -> OwnHook:
        return OwnHook()

    def __call__(self, *args: Any) -> None:
        """See `torch.nn.Module.register_forward_hook`."""


def _is_watched(own: Mapping[str, Any]) -> bool:
    for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
        for hook in hooks.values():
            known = isinstance(hook, OwnHook) or _INSTALLED_BY_TRANSFORMERS in getattr(hook, "__qualname__", "")
            if not known:
                return True
    return False


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    # Buffers that are not saved belong to the forward pass: some rotary embeddings replace theirs in it.
    left_out = module._non_persistent_buffers_set
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and name not in left_out}


def _arithmetic(model: nn.Module) -> tuple[object, ...]:
    """What decides in which way torch computes."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    cuda = torch.backends.cuda
    return (
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.mkldnn.enabled,
    )

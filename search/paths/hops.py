"""The live model on a path: a list of hops, each of them a layer that others may share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from search.paths.families import Family

if TYPE_CHECKING:
    import torch


def layers_of(model: torch.nn.Module, family: Family) -> torch.nn.ModuleList:
    """The layers of a model of transformers."""
    found: torch.nn.ModuleList = getattr(getattr(model, "base_model", model), family.layers)
    return found


def hop(layer: torch.nn.Module, index: int, scale: float) -> torch.nn.Module:
    """A layer in another place of the model: the same parameters, but a slot of its own in the cache of keys and
    values.

    Args:
        layer: not changed.
        index: the place.
        scale: factor on the hidden state that enters.
    """
    found = _shallow(layer, index)
    if scale != 1.0:

        def scaled(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

        found.register_forward_pre_hook(scaled, with_kwargs=True)
    return found


def _shallow(module: torch.nn.Module, index: int) -> torch.nn.Module:
    """A module of its own around the same parameters and buffers. Its hooks are copies, in which others can be."""
    found = copy.copy(module)
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers") or name.endswith(("_hooks", "_hooks_with_kwargs")):
            found.__dict__[name] = copy.copy(value)
    found.__dict__["_modules"] = {
        name: None if child is None else _shallow(child, index) for name, child in module._modules.items()
    }
    if isinstance(getattr(found, "layer_idx", None), int):
        found.layer_idx = index
    return found


@contextmanager
def on_path(
    model: torch.nn.Module,
    family: Family,
    layers: Sequence[torch.nn.Module],
    scales: Sequence[float],
    config: Mapping[str, Any],
) -> Iterator[None]:
    """Run a block with the model on a path; afterwards it has its own layers again.

    Args:
        layers: of every hop, repeated where the path comes back to one.
        scales: of every hop.
        config: keys of `config.json` that the path has other values for, as in `changed_config`.
    """
    import torch

    base: Any = getattr(model, "base_model", model)
    own, settings = layers_of(model, family), base.config
    before = {key: copy.copy(getattr(settings, key, None)) for key in config}
    hops = [hop(layer, index, scale) for index, (layer, scale) in enumerate(zip(layers, scales, strict=True))]
    try:
        for key, value in config.items():
            setattr(settings, key, value)
        setattr(base, family.layers, torch.nn.ModuleList(hops).train(own.training))
        yield
    finally:
        setattr(base, family.layers, own)
        for key, value in before.items():
            setattr(settings, key, value)

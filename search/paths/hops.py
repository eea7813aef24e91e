"""The live model on a path: a list of hops, each of them a layer that others may share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
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
        # Not by a hook: whoever looks at the state between two layers sees it before it is scaled.
        kind: Any = type(found)
        found.__class__ = _scaled_kind(kind)
        found.entry_scale = scale
    return found


@cache
def _scaled_kind(kind: Any) -> Any:
    """The class of a layer that scales the hidden state on entry."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            return kind.forward(self, args[0] * self.entry_scale, *args[1:], **kwargs)
        return kind.forward(self, **{**kwargs, "hidden_states": kwargs["hidden_states"] * self.entry_scale})

    return type(kind.__name__, (kind,), {"forward": forward})


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

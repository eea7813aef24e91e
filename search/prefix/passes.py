"""One forward pass: hidden states of its input are recorded, or stand for the layers that made them.

While a pass goes on, the layers' `forward` is ours. It hands on what it is given until a layer is reached whose input
is not known. Whatever is not understood runs as if nobody looked: a key-value cache, hidden states that are asked for,
layers that get or return something other than tensors, that are not called once each in their order, or whose output
is not just what the next one is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = (str, bool, int, float, type(None), torch.dtype)
_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")


class Known(NamedTuple):
    """The state that enters a layer."""

    layer: int
    state: Tensor


def input_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """32 bytes that stand for the input of a forward pass; None for one with more than tensors and plain values, or
    that asks for more than logits."""
    if kwargs.get("use_cache") or any(value for name, value in kwargs.items() if name.startswith("output_")):
        return None
    hashed = hashlib.blake2b(digest_size=32)
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, Tensor):
            odd = value.is_sparse or value.is_quantized or value.requires_grad
            if odd or torch._C._functorch.is_batchedtensor(value):
                return None
            hashed.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, _PLAIN):
            hashed.update(repr((name, value)).encode())
        else:
            return None
    return hashed.digest()


def asks_for_more(model: nn.Module) -> bool:
    """Whether the config of a model has it return more than what follows from its last hidden state."""
    config = getattr(model, "config", None)
    return any(getattr(config, flag, False) for flag in _FLAGS)


class Pass:
    """The layers during one forward pass. `end` must be called.

    Args:
        layers: in the order in which they run.
        choose: called before the first layer, when all that comes before has run; returns the state to begin with.
        wanted: layers whose inputs are recorded; the number of layers stands for what leaves the last.

    Attributes:
        understood: whether everything was as expected.
        recorded: layer -> the state that enters it.
        reused: layers that did not run.
        state_bytes: of one layer.
    """

    def __init__(self, layers: nn.ModuleList, choose: Callable[[], Known | None], wanted: Collection[int]) -> None:
        self.understood = True
        self.recorded: dict[int, Tensor] = {}
        self.reused = self.state_bytes = 0
        self._layers, self._choose, self._wanted = tuple(layers), choose, wanted
        self._known: Known | None = None
        self._next, self._last = 0, None
        self._before: list[tuple[nn.Module, Any]] = []
        for number, layer in enumerate(self._layers):
            own = vars(layer).get("forward")
            self._before.append((layer, own))
            layer.forward = self._forward(number, layer.forward)

    @property
    def done(self) -> bool:
        """Whether the last layer has run."""
        return self._next == len(self._layers)

    def end(self) -> None:
        """Give the layers back."""
        for layer, own in self._before:
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own
        self._before.clear()
        self.understood = self.understood and self.done

    def _forward(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.understood:
                return original(*args, **kwargs)
            state = args[0] if args else kwargs.get("hidden_states")
            others = [*args[1:], *(value for name, value in kwargs.items() if args or name != "hidden_states")]
            in_order = number == self._next and (number == 0 or state is self._last)
            tensors = _tensors(others)
            if not in_order or tensors is None or not isinstance(state, Tensor):
                if self._known is not None and number < self._known.layer:
                    raise RuntimeError("layers that were skipped are called in another order than before")
                self.understood = False
                return original(*args, **kwargs)
            if number == 0:
                self._known = self._choose()
                self.state_bytes = state.nbytes
            if self._known is not None and number < self._known.layer:
                self.reused += 1
                self._next += 1
                self._last = self._known.state
                return self._last
            versions = [tensor._version for tensor in tensors]
            found = original(*args, **kwargs)
            self._next += 1
            # A layer that hands something on by another way than its output is not understood.
            same = versions == [tensor._version for tensor in tensors]
            if not isinstance(found, Tensor) or found.shape != state.shape or not same:
                self.understood = False
                return found
            if number + 1 in self._wanted:
                self.recorded[number + 1] = found
            self._last = found
            return found

        return forward


def _tensors(values: Collection[Any]) -> list[Tensor] | None:
    """The tensors among the arguments of a layer; None if something is there that could carry more."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            inside = _tensors(value)
            if inside is None:
                return None
            found += inside
        elif not isinstance(value, _PLAIN):
            return None
    return found

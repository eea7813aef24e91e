"""Forward passes of a live model that begin where an earlier candidate with the same first layers had got to.

Evaluators call the model as ever. The first pass of a model shows which of its modules are used after the layers only
(the last norm, the head): all else belongs to what two candidates must have in common. The first pass that leaves
out so many layers is repeated in full, and must give the same bits; a model for which it does not is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from search.prefix.contents import Contents, contents_of
from search.prefix.layers import OwnHook, find_layers, outer_modules, places_of, state_of
from search.prefix.passes import Known, Pass, asks_for_more, input_key
from search.prefix.states import StateCache, boundaries


class PrefixReuse:
    """Counts the layers that run for a candidate, and spares those whose result is known.

    Args:
        capacity: most bytes of hidden states that are kept, on the devices of the model; 0: none, layers are counted.

    Attributes:
        states: what is kept.
        layers_run, layers_reused: of the candidate that was watched last, layers that ran and that did not have to.
        trusted: whether the model gave the same bits both ways whenever that was looked at.
    """

    def __init__(self, capacity: int) -> None:
        self.states = StateCache(capacity)
        self.layers_run = self.layers_reused = 0
        self.trusted = True
        self._model: weakref.ref[nn.Module] | None = None
        self._after: frozenset[str] | None = None
        self._verified: set[int] = set()
        self._state_bytes = 0

    def clear(self) -> None:
        """Let go of all states, and of what is known about the model."""
        self.states.clear()
        self._model = self._after = None
        self._verified.clear()

    def shrink(self) -> bool:
        """Let go of all states, and keep half as much from now on; returns whether there was something to let go of."""
        used = self.states.used
        self.states.clear()
        self.states.capacity //= 2
        return used > 0

    @contextmanager
    def watching(
        self,
        model: nn.Module,
        targets: Mapping[str, Tensor],
        fingerprints: Mapping[str, object],
        along: Callable[[Contents], Contents] = lambda contents: contents,
    ) -> Iterator[Watch]:
        """Watch the forward passes of one candidate.

        Args:
            targets: tensor of the checkpoint -> where it lives in the model.
            fingerprints: what each of them is made by, see `Merger.fingerprints`.
            along: makes the contents of the layers that run of those that the model has, for one with a path.
        """
        self.layers_run = self.layers_reused = 0
        layers = find_layers(model)
        if layers is None:
            yield Watch()
            return
        if self._model is None or self._model() is not model:
            self._after, self._verified = None, set()
            self._model = weakref.ref(model)
        watch = _Watching(self, model, layers, targets, fingerprints, along)
        try:
            yield watch
        finally:
            watch.close()
            self._state_bytes = watch.state_bytes or self._state_bytes


class Watch:
    """What one candidate's evaluators may do.

    Attributes:
        allowed: whether passes may begin with known states: not for evaluators that may have touched the weights.
    """

    allowed = False


class _Watching(Watch):
    def __init__(
        self,
        reuse: PrefixReuse,
        model: nn.Module,
        layers: nn.ModuleList,
        targets: Mapping[str, Tensor],
        fingerprints: Mapping[str, object],
        along: Callable[[Contents], Contents],
    ) -> None:
        self._reuse, self._model, self._layers = reuse, model, layers
        self._targets, self._fingerprints, self._along = targets, fingerprints, along
        self._chain: tuple[bytes, ...] | None = None
        self._pass: Pass | None = None
        self._key = b""
        self._early: set[str] = set()
        self._late: set[str] = set()
        self._verifying = False
        self.state_bytes = 0
        self._hooks = [layer.register_forward_pre_hook(_Hook(self._count)) for layer in layers]
        if reuse.states.capacity:
            for name, module in outer_modules(model, layers).items():
                self._hooks.append(module.register_forward_pre_hook(_Named(self._called, name)))
            begin, end = _Hook(self._begin), _Hook(self._end)
            self._hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(end, with_kwargs=True, always_call=True))
        self._state = state_of(model)

    def close(self) -> None:
        """Leave the model as it was."""
        if self._pass is not None:
            self._pass.end()
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, args: object) -> None:
        self._reuse.layers_run += 1

    def _called(self, name: str) -> None:
        if self._pass is not None:
            (self._late if self._pass.done else self._early).add(name)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model or self._pass is not None or self._verifying:  # a copy of it, or from within
            return
        if not (self.allowed and self._reuse.trusted) or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return
        key = None if asks_for_more(self._model) else input_key(args, kwargs)
        if key is None or self._state is None or state_of(self._model) != self._state:
            return
        self._key = key
        self._early, self._late = {""}, set()
        states = self._reuse.states
        wanted = boundaries(len(self._layers), states.capacity, self._reuse._state_bytes)
        self._pass = Pass(self._layers, self._choose, wanted)

    def _choose(self) -> Known | None:
        """The state to begin with. All modules that are used before the layers have been called by now."""
        reuse = self._reuse
        if reuse._after is None:
            return None
        if reuse._after & self._early:  # used earlier than it was so far
            reuse.states.clear()
            reuse._after -= self._early
            self._chain = None
            return None
        found = reuse.states.deepest(self._signatures(reuse._after), self._key)
        return None if found is None else Known(*found)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module is not self._model or self._pass is None or self._verifying:
            return None
        ended, self._pass = self._pass, None
        ended.end()
        reuse = self._reuse
        reuse.layers_run -= ended.reused
        reuse.layers_reused += ended.reused
        if output is None:  # it raised something
            return None
        if ended.reused and ended.reused not in reuse._verified:
            whole = self._in_full(args, kwargs)
            if not _same_bits(output, whole):
                reuse.trusted = False
                reuse.states.clear()
                return whole
            reuse._verified.add(ended.reused)
        if not ended.understood:
            return None
        if reuse._after is None:
            reuse._after = frozenset(self._late - self._early)
        self.state_bytes += ended.state_bytes
        if ended.recorded:
            recorded = {layer: _compact(state) for layer, state in ended.recorded.items()}
            reuse.states.keep(self._signatures(reuse._after), self._key, recorded)
        return None

    def _signatures(self, after: frozenset[str]) -> tuple[bytes, ...]:
        if self._chain is None:
            places = places_of(self._model, self._layers, after, self._targets)
            contents = self._along(contents_of(self._fingerprints, places, len(self._layers)))
            self._chain = contents.chain()
        return self._chain

    def _in_full(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gpus = {p.device.index or 0 for p in self._model.parameters() if p.device.type == "cuda"}
        self._verifying = True
        try:
            with torch.random.fork_rng(devices=sorted(gpus)):
                return self._model(*args, **kwargs)
        finally:
            self._verifying = False


class _Hook(OwnHook):
    """Calls a function of the watch."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Named(OwnHook):
    """Tells that a module is called."""

    def __init__(self, function: Callable[[str], None], name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, *args: Any) -> None:
        self._function(self._name)


def _compact(state: Tensor) -> Tensor:
    """The state without the rest of the memory that it is a view into."""
    return state.clone() if state.untyped_storage().nbytes() > state.nbytes else state


def _same_bits(one: Any, other: Any) -> bool:
    """Whether two outputs of a model are the same, NaN included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        pair = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return bool(torch.equal(*pair))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same_bits(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same_bits, one, other))
    return type(one) is type(other) and (one is other or isinstance(one, type(None) | int | float | str))

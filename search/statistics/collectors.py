"""What is collected while a model reads items: squared gradients, or Gram matrices of the inputs of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from search.merge.live import LiveModel


class Collector(Protocol):
    """Watches a live model read one window of one item after the other, without padding."""

    needs_gradients: bool

    def read_window(self, loss: Tensor) -> None:
        """After a forward pass; `loss` is the negative log-likelihood of the window, summed over its tokens."""
        ...

    def read_item(self) -> None:
        """After the last window of an item."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What was found, as `kind/tensor of the checkpoint`, float32 on the CPU; ends the collection."""
        ...


class FisherCollector:
    """Diagonal empirical Fisher information: the mean over items of (d log p(item) / d w)^2.

    The labels are the tokens of the items, not draws from the model. Buffers have none.

    Args:
        names: tensors of the checkpoint.
    """

    needs_gradients = True

    def __init__(self, live: LiveModel, names: Iterable[str]) -> None:
        self._model, self._items = live.model, 0
        self._targets = live.targets(names, tied=True)
        for parameter in live.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._sums = {id(parameter): _zeros_like(parameter) for parameter in live.model.parameters()}

    def read_window(self, loss: Tensor) -> None:
        loss.backward()

    def read_item(self) -> None:
        self._items += 1
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                self._sums[id(parameter)].add_(parameter.grad.float().square_())
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        self._model.requires_grad_(False)
        found = {}
        for parameter in self._model.parameters():
            total = self._sums.pop(id(parameter)).div_(self._items)
            for name, target in _inside(parameter, self._targets).items():
                offset = target.storage_offset() - parameter.storage_offset()
                part = total.as_strided(target.shape, target.stride(), offset)
                found[f"fisher/{name}"] = part.cpu().contiguous()
        return found


class GramCollector:
    """The mean of x x^T over all inputs x of every `nn.Linear` and Conv1D, for the tensors that lie in its weight.

    Left out are weights that an embedding shares, whose inputs are more than those, and layers that were not
    called. Experts that are one tensor in the live model are no layers of their own, and are left out too.
    """

    needs_gradients = False

    def __init__(self, live: LiveModel, names: Iterable[str]) -> None:
        from transformers.pytorch_utils import Conv1D

        targets = live.targets(names, tied=True)
        embeddings = {m.weight.data_ptr() for m in live.model.modules() if isinstance(m, nn.Embedding)}
        self._sums: dict[nn.Module, Tensor] = {}
        self._rows: dict[nn.Module, int] = {}
        self._names: dict[nn.Module, dict[str, int]] = {}
        self._hooks = []
        for module in live.model.modules():
            if not isinstance(module, nn.Linear | Conv1D) or module.weight.data_ptr() in embeddings:
                continue
            axis = 0 if isinstance(module, Conv1D) else 1
            inside = _inside(module.weight, targets)
            axes = {name: _same_axis(target, module.weight, axis) for name, target in inside.items()}
            known = {name: found for name, found in axes.items() if found is not None}
            if known:
                self._names[module] = known
                self._hooks.append(module.register_forward_hook(self._see, with_kwargs=True))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        values = args[0] if args else next(iter(kwargs.values()))
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        if module not in self._sums:
            self._sums[module] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._rows[module] = 0
        self._sums[module].addmm_(rows.T, rows)
        self._rows[module] += len(rows)

    def read_window(self, loss: Tensor) -> None: ...

    def read_item(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        found: dict[str, Tensor] = {}
        for module, names in self._names.items():
            if not self._rows.get(module):
                continue
            gram = self._sums.pop(module).div_(self._rows[module]).cpu()
            for name, axis in names.items():
                found |= {f"gram/{name}": gram, f"gram_axis/{name}": torch.tensor(axis)}
        return found


def _zeros_like(parameter: Tensor) -> Tensor:
    """Float32 zeros that lie in memory as the parameter does, so that views into it are views into them."""
    span = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True)) + 1
    memory = torch.zeros(span if parameter.numel() else 0, device=parameter.device)
    return memory.as_strided(parameter.shape, parameter.stride())


def _inside(parameter: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint tensors that are views into a parameter."""
    memory, first = parameter.untyped_storage().data_ptr(), parameter.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return {
        name: target
        for name, target in targets.items()
        if target.numel() and target.untyped_storage().data_ptr() == memory and first <= target.storage_offset() <= last
    }


def _same_axis(target: Tensor, weight: Tensor, axis: int) -> int | None:
    """Which axis of a matrix inside a weight is the whole of the weight's `axis`; None for no such."""
    if target.dim() != 2:
        return None
    for found in (axis, 1 - axis):
        if target.shape[found] == weight.shape[axis] and target.stride(found) == weight.stride(axis):
            return found
    return None

"""Learned soups (Wortsman 2022, https://arxiv.org/abs/2203.05482, appendix I): weights of models by gradient.

Minimises the loss of theta_l = sum_i a_li theta_li over a_l = softmax(raw_l), with one a_l for every group l of
tensors. One backward pass through the merged model gives the gradient of every parameter, and

    d loss / d a_li = <d loss / d theta_l, theta_li>

is an inner product with the mapped source, taken when the gradient of that parameter is complete and before
the next one is: no source is held in memory, and no more than one parameter's gradient.

Other than in the paper every step takes the gradient over all items instead of a batch: the search items are
few, and nothing depends on an order. The weights with the lowest loss seen are kept, so a learned soup is
never worse than what it started from, on these items and by this loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluators.base import Evaluator
from search.errors import MeiosisError
from search.merge.apply import Merger
from search.merge.live import LiveModel
from search.merge.operator import ACCELERATOR_BLOCK_ELEMENTS, BLOCK_ELEMENTS
from search.merge.sources import TensorSource
from search.recipe import Recipe
from search.soups.plan import LearnSoup, LossTerm, mixture, weight_key, weights_of


def learn_soup(
    start: Recipe,
    plan: LearnSoup,
    *,
    live: LiveModel,
    names: Sequence[str],
    merger: Merger,
    sources: Mapping[str, TensorSource],
    evaluators: Mapping[str, Evaluator],
) -> dict[str, float]:
    """Learned weights by `weight_key`, and the loss before and after as `soup/start` and `soup/end`.

    Args:
        start: a recipe of `mixture` rules with positive weights, which are divided by their sum; every rule is
            a group.
        live: a float32 model, overwritten.
        names: the tensors of the checkpoint.
        sources: model name -> its tensors.
        evaluators: prepared; at least those of the terms.

    Raises:
        MeiosisError: the loss of the start is not finite.
    """
    gradient = MixingGradient(start, live, names, merger, sources)
    loss = SoupLoss(gradient, plan.terms, evaluators)
    given = weights_of(start)
    raw = torch.tensor([[math.log(w) for w in group.values()] for group in given], dtype=torch.float64)
    raw.requires_grad_()
    temperature = torch.ones((), dtype=torch.float64, requires_grad=plan.temperature)
    learned = [raw, temperature] if plan.temperature else [raw]
    optimizer = torch.optim.AdamW(learned, lr=plan.rate, weight_decay=0.0)
    best, kept, first = math.inf, raw.detach().softmax(1), math.nan
    for step in range(plan.steps + 1):
        weights = raw.softmax(1)
        last = step == plan.steps
        value, by_weight, by_temperature = loss.at(weights.detach(), float(temperature.detach()), backward=not last)
        if step == 0:
            first = value
            if not math.isfinite(value):
                raise MeiosisError(f"the soup that learning starts from has the loss {value}")
        if value < best:
            best, kept = value, weights.detach()
        if last or not math.isfinite(value):
            break
        weights.backward(by_weight)
        temperature.grad = torch.tensor(by_temperature, dtype=torch.float64) if plan.temperature else None
        optimizer.step()
        optimizer.zero_grad()
    found = {
        weight_key(index, source): float(kept[index, column])
        for index, group in enumerate(given)
        for column, source in enumerate(group)
    }
    return {**found, "soup/start": first, "soup/end": best}


class MixingGradient:
    """The gradient of a loss by the weights of a soup, from the gradients by the parameters of the model.

    Buffers (statistics of normalisation layers) are merged like all tensors and count as constants.

    Where a model is laid over several devices, each has a thread of its own for gradients: every tensor has its own
    sums, which are added up in the order of tensors and not in that in which gradients come.
    """

    def __init__(
        self,
        start: Recipe,
        live: LiveModel,
        names: Sequence[str],
        merger: Merger,
        sources: Mapping[str, TensorSource],
    ) -> None:
        self.model = live.model
        self._start = start.model_copy(update={"dtype": None})
        self._merger, self._sources = merger, sources
        self._targets = live.targets(names)
        self._models = tuple(start.rules[0].sources)
        if any(tuple(rule.sources) != self._models for rule in start.rules):
            raise ValueError("expected the same sources in every rule")
        self._groups = len(start.rules)
        group_of = {id(rule): index for index, rule in enumerate(start.rules)}
        self._group = {name: group_of[id(rule)] for name, rule in start.assign(names).items()}
        self._places = _places(self.model, self._targets)
        self.clear()

    @property
    def sums(self) -> Tensor:
        """(n_groups, n_sources) float64, d loss / d weight since `clear`."""
        total = torch.zeros(self._groups, len(self._models), dtype=torch.float64)
        for name, sums in self._sums.items():
            total[self._group[name]] += torch.tensor(sums, dtype=torch.float64)
        return total

    def clear(self) -> None:
        """Set the sums to zero."""
        self._sums = {name: [0.0] * len(self._models) for _, names in self._places for name in names}

    def write(self, weights: Tensor) -> None:
        """Merge the soup with these weights, (n_groups, n_sources), into the model."""
        rules = tuple(
            mixture(rule.tensors, dict(zip(self._models, row, strict=True)))
            for rule, row in zip(self._start.rules, weights.tolist(), strict=True)
        )
        self._merger.merge_into(self._start.model_copy(update={"rules": rules}), self._targets)

    def __enter__(self) -> MixingGradient:
        self._hooks: list[Any] = []
        for parameter, names in self._places:
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take(names)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, _ in self._places:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _take(self, names: Sequence[str]) -> Callable[[Tensor], None]:
        """Turn the complete gradient of a parameter into numbers, and let go of it."""

        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
                ).copy_(gradient)
            for name in names:
                target = self._targets[name]
                offset = gradient.storage_offset() + target.storage_offset() - parameter.storage_offset()
                part = gradient.as_strided(target.shape, target.stride(), offset).reshape(-1)
                for column, model in enumerate(self._models):
                    self._sums[name][column] += _inner(part, self._sources[model].get(name))

        return hook


class SoupLoss:
    """The loss of a soup on the search items, and its gradient by weights and temperature."""

    def __init__(
        self, gradient: MixingGradient, terms: Sequence[LossTerm], evaluators: Mapping[str, Evaluator]
    ) -> None:
        self._gradient = gradient
        total = sum(term.weight for term in terms)
        self._shares: dict[str, float] = {}
        for term in terms:
            name, _, metric = term.metric.partition(".")
            scale = term.scale if metric == evaluators[name].loss_metric else 1.0
            self._shares[name] = self._shares.get(name, 0.0) + term.weight / scale / total
        self._evaluators = {name: evaluators[name] for name in self._shares}

    def at(self, weights: Tensor, temperature: float = 1.0, *, backward: bool = True) -> tuple[float, Tensor, float]:
        """Loss, its gradient by the weights, (n_groups, n_sources) float64, and by the temperature.

        Args:
            temperature: factor on the logits.
            backward: False leaves the gradients zero.
        """
        self._gradient.write(weights)
        value, by_temperature = 0.0, 0.0
        by_weight = torch.zeros(weights.shape, dtype=torch.float64)
        with self._gradient, torch.set_grad_enabled(backward):
            factor = torch.tensor(temperature, dtype=torch.float32, requires_grad=True)
            model = self._gradient.model if temperature == 1.0 and not backward else _Tempered(self._gradient, factor)
            for name, evaluator in self._evaluators.items():
                self._gradient.clear()
                factor.grad = None
                sums, weight = [], 0.0
                for loss, count in evaluator.losses(model, evaluator.items("search")):
                    if backward:
                        loss.backward()
                    sums.append(float(loss.detach()))
                    weight += count
                share = self._shares[name] / weight
                value += share * math.fsum(sums)
                by_weight += share * self._gradient.sums
                by_temperature += share * float(factor.grad) if factor.grad is not None else 0.0
        return value, by_weight, by_temperature


class _Tempered(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """The model with its logits multiplied by a factor, as the paper calibrates the soup while it learns."""

    def __init__(self, gradient: MixingGradient, factor: Tensor) -> None:
        super().__init__()
        self.model, self.factor = gradient.model, factor
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        out.logits = out.logits * self.factor.to(out.logits.device)
        return out


def _places(model: torch.nn.Module, targets: Mapping[str, Tensor]) -> list[tuple[Tensor, list[str]]]:
    """Parameters, each with the names of the checkpoint's tensors that live in it."""
    parameters = [(parameter, _memory(parameter)) for parameter in model.parameters()]
    found: list[tuple[Tensor, list[str]]] = []
    for parameter, memory in parameters:
        start = parameter.storage_offset()
        inside = range(start, start + parameter.numel())
        names = [name for name, t in targets.items() if _memory(t) == memory and t.storage_offset() in inside]
        if names and parameter.dtype.is_floating_point:
            found.append((parameter, names))
    return found


def _memory(tensor: Tensor) -> int:
    pointer: int = tensor.untyped_storage().data_ptr()
    return pointer


def _inner(gradient: Tensor, source: Tensor) -> float:
    """Inner product of a flat gradient and a mapped tensor of any dtype, block by block, summed in float64."""
    elements = BLOCK_ELEMENTS if gradient.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    flat = source.reshape(-1)
    sums = []
    for start in range(0, len(flat), elements):
        block = flat[start : start + elements].to(gradient.device, torch.float32)
        product = block * gradient[start : start + elements]
        # There are devices without float64.
        sums.append(float(product.sum(dtype=torch.float32 if product.device.type == "mps" else torch.float64)))
    return math.fsum(sums)

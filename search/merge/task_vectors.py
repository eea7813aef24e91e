"""Sums of task vectors d_i = x_i - base, shared by task arithmetic, TIES and DARE.

Products are rounded before they are added, in the order of the sources, so that CPU and GPU, which
fuse multiply and add differently, give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search.merge.inputs import row_sums, sum_of_weights
from search.merge.mask_norms import masked_norms
from search.merge.masks import LEVELS, CounterMask
from search.merge.narrow import NARROW, merge_narrow, round_to
from search.merge.operator import Block, Inputs
from search.merge.rows import torch_sum, whole_task_vector

Trim = Callable[[Tensor, int], None]
"""Zeroes elements of a task vector in place: (elements, flat index of the first)."""

TINY_WEIGHT = 1e-8
"""Sums of weights below this divide by 1."""

TINY_NORM = 1e-7
"""Task vectors whose L1 norm is below this, before or after trimming, are not rescaled."""


@dataclass(frozen=True)
class Trimmed:
    """How the task vectors of one tensor are trimmed: a trim and a factor of what is left for every source.

    Attributes:
        rescales: what in the factors gives a task vector its norm back; empty where that is one number with them.
    """

    trims: Sequence[Trim]
    factors: Sequence[float]
    rescales: Sequence[float] = ()


def keep_all(delta: Tensor, start: int) -> None:
    """No trim."""


def drop_all(delta: Tensor, start: int) -> None:
    """The trim of density 0."""
    delta.zero_()


class ListedTrim:
    """Zeroes the elements of a list.

    Args:
        dropped: (elements of the tensor,) bool.
    """

    def __init__(self, dropped: Tensor) -> None:
        self.dropped = dropped

    def __call__(self, delta: Tensor, start: int) -> None:
        """Apply in place to the elements from `start` on."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[delta.element_size()]
        # All ones where an element stays: many times as fast as what is told by bools.
        delta.view(bits).bitwise_and_(self.dropped[start : start + delta.numel()].to(bits).sub_(1))


@dataclass(frozen=True)
class TaskVectors:
    """base + scale * a sum of E_i = factors[i] trims[i](d_i), as an `Apply`.

    The coefficients are data, so that a kernel can do the same in one pass.

    Attributes:
        elects: whether a sign is elected per element (Yadav 2023, https://arxiv.org/abs/2306.01708, steps 2
            and 3): with s = sign of sum_i E_i (+ for 0), only the E_i whose sign is s are added.
        divides: whether the sum is divided; by `divisor`, or where a sign is elected by the sum of the
            `weights` of the E_i whose sign is s (1 for none).
        rescales: where a factor is a weight times what gives a trimmed task vector its norm back, the latter.
            With `compute: inputs` they are two products.
    """

    inputs: Inputs
    trims: tuple[Trim, ...]
    factors: tuple[float, ...]
    weights: tuple[float, ...]
    rescales: tuple[float, ...]
    elects: bool
    divides: bool
    divisor: float
    scale: float

    @property
    def rescales_first(self) -> bool:
        """Whether some factor is to be two products."""
        return self.inputs.compute == "inputs" and any(scale != 1.0 for scale in self.rescales)

    def __call__(self, block: Block, out: Tensor) -> None:
        if out.dtype in NARROW:
            merge_narrow(self, block, out)
        elif self.elects:
            self._elect(block, out)
        else:
            self._sum(block, out)

    def _sum(self, block: Block, out: Tensor) -> None:
        delta = self.inputs.scratch("delta")[: out.numel()]
        for index in range(len(self.trims)):
            self._scaled(block, index, delta if index else out)
            if index:
                out.add_(delta)
        if self.divides:
            # A tensor, because CUDA divides by a Python number with its rounded reciprocal.
            out.div_(torch.tensor(self.divisor, dtype=out.dtype, device=out.device))
        self._finish(block, out)

    def _elect(self, block: Block, out: Tensor) -> None:
        elements = out.numel()
        scaled = [self.inputs.scratch(f"scaled {index}")[:elements] for index in range(len(self.trims))]
        sign, share = self.inputs.scratch("sign")[:elements], self.inputs.scratch("delta")[:elements]
        for index, delta in enumerate(scaled):
            self._scaled(block, index, delta)
            if index:
                out.add_(delta)
            else:
                out.copy_(delta)
        torch.copysign(sign.fill_(1.0), out, out=sign)
        for index, delta in enumerate(scaled):
            delta.mul_(sign).clamp_min_(0.0)  # the magnitude where the signs agree, else 0
            if index:
                out.add_(delta)
            else:
                out.copy_(delta)
        out.mul_(sign)
        if self.divides:
            for index, delta in enumerate(scaled):
                delta.sign_().mul_(self.weights[index])
                if index:
                    share.add_(delta)
                else:
                    share.copy_(delta)
            # Where nothing is kept the sum is 0 and so is the share: 0 + (0 == 0) divides by 1.
            share.add_(torch.eq(share, 0.0, out=sign))
            out.div_(share)
        self._finish(block, out)

    def _scaled(self, block: Block, index: int, out: Tensor) -> None:
        torch.sub(block.sources[index], block.base, out=out)
        self.trims[index](out, block.start)
        if self.rescales_first and self.rescales[index] != 1.0:
            out.mul_(self.rescales[index]).mul_(self.weights[index])
        else:
            out.mul_(self.factors[index])

    def _finish(self, block: Block, out: Tensor) -> None:
        if self.scale != 1.0:
            out.mul_(self.scale)
        out.add_(block.base)


def sum_task_vectors(
    inputs: Inputs,
    per_source: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    trims: Sequence[Trim],
    factors: Sequence[float],
    rescales: Sequence[float] = (),
) -> TaskVectors:
    """base + lambda * sum_i factor_i trim_i(d_i), over sum_i w_i if `normalize`."""
    weights = tuple(float(values["weight"]) for values in per_source)
    if inputs.dtype in NARROW:  # rounded one by one, added in float32
        total = sum_of_weights((round_to(weight, inputs.dtype) for weight in weights), torch.float32)
    else:
        total = sum_of_weights(weights, inputs.dtype)
    divides = bool(shared["normalize"]) and abs(total) >= TINY_WEIGHT and total != 1.0
    scale = float(shared["lambda"])
    rescaling = tuple(rescales) or (1.0,) * len(weights)
    return TaskVectors(inputs, tuple(trims), tuple(factors), weights, rescaling, False, divides, total, scale)


def elect_task_vectors(
    inputs: Inputs,
    per_source: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    trims: Sequence[Trim],
    factors: Sequence[float],
    rescales: Sequence[float] = (),
) -> TaskVectors:
    """The disjoint merge of TIES: the E_i whose sign is that of their sum, over the sum of their weights if
    `normalize`, times lambda, plus the base."""
    weights = tuple(float(values["weight"]) for values in per_source)
    scale = float(shared["lambda"])
    divides, rescaling = bool(shared["normalize"]), tuple(rescales) or (1.0,) * len(weights)
    return TaskVectors(inputs, tuple(trims), tuple(factors), weights, rescaling, True, divides, 1.0, scale)


def rescaled_factors(
    inputs: Inputs, weights: Sequence[float], trims: Sequence[Trim], keys: Sequence[object], rescale: bool
) -> list[float]:
    """The weights, times the factors that give trimmed task vectors their L1 norms back if `rescale`.

    Args:
        keys: what each trim depends on beyond tensor, base and model, for the cache.
    """
    if not rescale:
        return list(weights)
    places = [("rescale", inputs.name, inputs.base, *pair) for pair in zip(inputs.models, keys, strict=True)]
    scales = {i: inputs.cache[place] for i, place in enumerate(places) if place in inputs.cache}
    norms: dict[int, tuple[list[float], list[float]]] = {}  # before and after the trim
    for index, trim in enumerate(trims):
        if trim is keep_all:
            scales[index] = 1.0
        elif index in scales:
            continue
        elif inputs.compute == "inputs":
            scales[index] = inputs.cache[places[index]] = _torch_scale(inputs, index, trim)
        else:
            norms[index] = ([], [])
    for block in inputs.blocks() if norms else ():
        delta = inputs.scratch("delta")[: block.stop - block.start]
        for index, (before, after) in norms.items():
            torch.sub(block.sources[index], block.base, out=delta)
            delta.abs_()
            before.extend(row_sums(delta))
            trims[index](delta, block.start)
            after.extend(row_sums(delta))
    for index, (before, after) in norms.items():
        whole, kept = math.fsum(before), math.fsum(after)
        scales[index] = 1.0 if min(whole, kept) < TINY_NORM else whole / kept
        inputs.cache[places[index]] = scales[index]
    return [weight * scales[index] for index, weight in enumerate(weights)]


def _torch_scale(inputs: Inputs, index: int, trim: Trim) -> float:
    """What gives a trimmed task vector its L1 norm back, as torch computes it in the dtype of the inputs."""
    delta, step = whole_task_vector(inputs, index).abs(), inputs.scratch("delta").numel()
    before = torch_sum(delta)
    for start in range(0, delta.numel(), step):
        trim(delta[start : start + step], start)
    after = torch_sum(delta)
    return 1.0 if min(float(before), float(after)) < TINY_NORM else float(before / after)


def rescaled(
    inputs: Inputs,
    per_source: Sequence[Mapping[str, Any]],
    trims: Sequence[Trim],
    keys: Sequence[object],
    rescale: bool,
) -> Trimmed:
    """Trimmed task vectors with their L1 norms given back if `rescale`; see `rescaled_factors`."""
    weights = [float(values["weight"]) for values in per_source]
    scales = rescaled_factors(inputs, [1.0] * len(weights), trims, keys, rescale)
    return Trimmed(trims, [weight * scale for weight, scale in zip(weights, scales, strict=True)], scales)


def mask_task_vectors(inputs: Inputs, per_source: Sequence[Mapping[str, Any]], rescale: bool) -> Trimmed:
    """The random masks of DARE and the factors that go with them, one per source."""
    trims: list[Trim] = []
    factors = []
    for index, (model, values) in enumerate(zip(inputs.models, per_source, strict=True)):
        mask = CounterMask(inputs, model, float(values["density"]))
        scale = 1.0
        if rescale and mask.level < LEVELS:
            whole, kept = masked_norms(inputs, index, mask)
            scale = 1.0 if min(whole, kept) < TINY_NORM else whole / kept
        trims.append(keep_all if mask.level == LEVELS else mask)
        factors.append(float(values["weight"]) * scale)
    return Trimmed(trims, factors)

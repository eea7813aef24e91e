"""Sums of task vectors d_i = x_i - base, shared by task arithmetic, TIES and DARE.

Products are rounded before they are added, in the order of the sources, so that CPU and GPU, which
fuse multiply and add differently, give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from search.merge.inputs import row_sums, sum_of_weights
from search.merge.masks import LEVELS, CounterMask
from search.merge.operator import Apply, Block, Inputs

Trim = Callable[[Tensor, int], None]
"""Zeroes elements of a task vector in place: (elements, flat index of the first)."""

TINY_WEIGHT = 1e-8
"""Sums of weights below this divide by 1."""

TINY_NORM = 1e-7
"""Task vectors whose L1 norm is below this, before or after trimming, are not rescaled."""


def keep_all(delta: Tensor, start: int) -> None:
    """No trim."""


def drop_all(delta: Tensor, start: int) -> None:
    """The trim of density 0."""
    delta.zero_()


def sum_task_vectors(
    inputs: Inputs,
    per_source: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    trims: Sequence[Trim],
    factors: Sequence[float],
) -> Apply:
    """base + lambda * sum_i factor_i trim_i(d_i), over sum_i w_i if `normalize`."""
    scale = float(shared["lambda"])
    total = sum_of_weights((float(values["weight"]) for values in per_source), inputs.dtype)
    if not shared["normalize"] or abs(total) < TINY_WEIGHT:
        total = 1.0
    # A tensor, because CUDA divides by a Python number with its rounded reciprocal.
    divisor = torch.tensor(total, dtype=inputs.dtype, device=inputs.device)

    def apply(block: Block, out: Tensor) -> None:
        delta = inputs.scratch("delta")[: out.numel()]
        for index in range(len(trims)):
            target = delta if index else out
            _scaled(block, index, trims[index], factors[index], target)
            if index:
                out.add_(delta)
        if total != 1.0:
            out.div_(divisor)
        _finish(out, scale, block)

    return apply


def elect_task_vectors(
    inputs: Inputs,
    per_source: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    trims: Sequence[Trim],
    factors: Sequence[float],
) -> Apply:
    """The disjoint merge of TIES (Yadav 2023, https://arxiv.org/abs/2306.01708, steps 2 and 3).

    With E_i = factor_i trim_i(d_i) and s = sign of sum_i E_i (+ for 0), per element: the sum of the
    E_i whose sign is s, over the sum of their weights if `normalize`, times lambda, plus the base.
    """
    scale = float(shared["lambda"])
    weights = [float(values["weight"]) for values in per_source]

    def apply(block: Block, out: Tensor) -> None:
        elements = out.numel()
        scaled = [inputs.scratch(f"scaled {index}")[:elements] for index in range(len(trims))]
        sign, share = inputs.scratch("sign")[:elements], inputs.scratch("delta")[:elements]
        for index, delta in enumerate(scaled):
            _scaled(block, index, trims[index], factors[index], delta)
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
        if shared["normalize"]:
            for index, delta in enumerate(scaled):
                delta.sign_().mul_(weights[index])
                if index:
                    share.add_(delta)
                else:
                    share.copy_(delta)
            # Where nothing is kept the sum is 0 and so is the share: 0 + (0 == 0) divides by 1.
            share.add_(torch.eq(share, 0.0, out=sign))
            out.div_(share)
        _finish(out, scale, block)

    return apply


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
        elif index not in scales:
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


def mask_task_vectors(
    inputs: Inputs, per_source: Sequence[Mapping[str, Any]], rescale: bool
) -> tuple[list[Trim], list[float]]:
    """The random masks of DARE and the factors that go with them, one per source."""
    masks = [
        CounterMask(inputs, model, float(values["density"]))
        for model, values in zip(inputs.models, per_source, strict=True)
    ]
    trims: list[Trim] = [keep_all if mask.level == LEVELS else mask for mask in masks]
    weights = [float(values["weight"]) for values in per_source]
    keys = [("mask", inputs.seed, mask.level) for mask in masks]
    return trims, rescaled_factors(inputs, weights, trims, keys, rescale)


def _scaled(block: Block, index: int, trim: Trim, factor: float, out: Tensor) -> None:
    torch.sub(block.sources[index], block.base, out=out)
    trim(out, block.start)
    out.mul_(factor)


def _finish(out: Tensor, scale: float, block: Block) -> None:
    if scale != 1.0:
        out.mul_(scale)
    out.add_(block.base)

"""SCE: select elements of high variance, weight models by their energy, erase what opposes the elected sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6
"""Energies that sum to less mean equal weights; the weights of an element are divided by at least this."""


class Sce(Operator):
    """base + sum_i W_i M_i d_i / max(sum_i W_i M_i, 1e-6).

    W_i is the mean square of d_i over the tensor, over the sum of all; M_i keeps the elements with the sign of
    sum_i d_i (+ for 0). With `select_topk` below 1 only the floor(topk N) elements of the largest population
    variance over the models are merged, N being the number of elements with any; of equal ones those that
    come last in the tensor. `prepare` finds the mean squares and counts the variances.
    """

    help = "task vectors weighted by their energy, merged where they vary most and their signs agree"
    source = "Wan 2024, FuseChat, https://arxiv.org/abs/2408.07990"
    parameters: ClassVar = (
        Parameter(
            "select_topk",
            "shared",
            "float",
            1.0,
            "share of the elements that vary which is merged, by variance",
            0.0,
            1.0,
            (0.05, 1.0, 0.5),
        ),
        Parameter("int8_mask", "shared", "bool", False, "accepted, changes nothing"),
    )
    needs_base = True
    prepares = "all_sources"
    preparation_optional = True
    prepared_version = 2

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.rankings import count

        if inputs.compute == "inputs":  # sorts what it needs
            return {"energies": _energies(inputs, None)}
        varying = sum(int(torch.count_nonzero(_variance(inputs, block))) for block in inputs.blocks())
        table = count(inputs, lambda block: _variance(inputs, block))
        return {"energies": _energies(inputs, None), "varying": torch.tensor(varying), **table}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.rows import task_vectors, wide

        topk = float(shared["select_topk"])
        known = prepared[0]
        if topk >= 1.0:
            select = None
            energies = known["energies"] if known else _energies(inputs, None)
        else:
            select = _select(inputs, known, topk)
            key = ("sce", inputs.name, inputs.models, inputs.base, inputs.dtype, select.number)
            if key not in inputs.cache:
                inputs.cache[key] = _energies(inputs, select)
            energies = inputs.cache[key]
        weights = _weights(energies)
        dtype = wide(inputs.dtype)

        def apply(block: Block, out: Tensor) -> None:
            # Products with 0, 1 and -1: passes over bools take many times as long.
            elements = out.numel()
            kept = None if select is None else inputs.scratch("kept")[:elements].copy_(select.kept(block))
            deltas = task_vectors(inputs, block)
            summed = inputs.scratch("sum", dtype)[:elements].zero_()
            for delta in deltas:
                if kept is not None:
                    delta.mul_(kept)
                summed += delta
            sign = inputs.scratch("sign")[:elements].copy_(summed).add_(0.0)  # of -0 it is +
            torch.copysign(torch.ones_like(sign), sign, out=sign)
            summed.zero_()
            share = inputs.scratch("share", dtype)[:elements].zero_()
            agrees = inputs.scratch("agrees")[:elements]
            for delta, weight in zip(deltas, weights, strict=True):
                delta.mul_(sign).clamp_min_(0.0)
                share.add_(torch.sign(delta, out=agrees), alpha=weight)
                summed += delta.mul_(weight)
            summed.mul_(sign)
            torch.div(summed.to(out.dtype), share.to(out.dtype).clamp_min_(TINY), out=out)
            out.add_(0.0).add_(block.base)

        return apply


class _Selection(NamedTuple):
    """The elements of the largest variance.

    Attributes:
        number: of them.
        kept: block -> (elements,) bool.
    """

    number: int
    kept: Callable[[Block], Tensor]


def _select(inputs: Inputs, prepared: Mapping[str, Tensor], topk: float) -> _Selection:
    import torch

    from search.merge.kernels.order import all_but_largest, all_but_ranks
    from search.merge.rankings import cuts
    from search.merge.rows import wide

    if inputs.compute == "inputs" or not prepared:
        variances = torch.empty(inputs.numel, dtype=wide(inputs.dtype), device=inputs.device)
        for block in inputs.blocks():
            variances[block.start : block.stop] = _variance(inputs, block)
        count = int(topk * int(torch.count_nonzero(variances)))
        if inputs.compute == "inputs":  # which of equal variances stay is up to torch, here as in mergekit
            listed = all_but_largest(variances, count, mode=inputs.kernels)
        else:
            listed = all_but_ranks(variances, inputs.numel - count, inputs.numel, "stable", mode=inputs.kernels)
        listed.logical_not_()
        return _Selection(count, lambda block: listed[block.start : block.stop])
    count = int(topk * int(prepared["varying"]))
    table = {name: prepared[name] for name in ("counts", "first") if name in prepared}
    rank = inputs.numel - count
    key = ("sce cut", inputs.name, inputs.models, inputs.base, inputs.dtype, rank)
    if key not in inputs.cache:
        inputs.cache[key] = cuts(inputs, lambda block: _variance(inputs, block), table, [rank])[rank]
    cut = inputs.cache[key]
    return _Selection(count, lambda block: cut.at_or_above(_variance(inputs, block), block.start))


def _variance(inputs: Inputs, block: Block) -> Tensor:
    """(elements,): the population variance of the task vectors, per element."""
    import torch

    from search.merge.rows import task_vectors

    elements = block.stop - block.start
    names = ("variance mean", "variance sum", "variance step")
    mean, summed, step = (inputs.scratch(name, torch.float64)[:elements] for name in names)
    deltas = task_vectors(inputs, block)
    mean.copy_(deltas[0])
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    summed.zero_()
    for delta in deltas:
        summed.addcmul_(torch.sub(delta, mean, out=step), step)
    # In float64 and rounded once, as torch.var does it, a hundred times faster.
    return inputs.scratch("variance")[:elements].copy_(summed.div_(len(deltas)))


def _energies(inputs: Inputs, select: _Selection | None) -> Tensor:
    """(models,): mean squares of the task vectors, the selected elements counted, rounded as the tensors are."""
    import torch

    from search.merge.inputs import row_sums
    from search.merge.rows import task_vectors
    from search.torch_threads import one_thread

    rows: list[list[float]] = [[] for _ in inputs.models]
    whole = inputs.compute == "inputs"
    squares = [torch.empty(inputs.numel if whole else 0, dtype=inputs.dtype, device=inputs.device) for _ in rows]
    for block in inputs.blocks():
        kept = None if select is None else inputs.scratch("kept")[: block.stop - block.start].copy_(select.kept(block))
        for index, delta in enumerate(task_vectors(inputs, block)):
            if kept is not None:
                delta.mul_(kept)
            if whole:
                torch.square(delta, out=squares[index][block.start : block.stop])
            else:
                rows[index].extend(row_sums(delta.square_()))
    if whole:
        with one_thread():
            return torch.stack([values.mean() for values in squares]).cpu()
    means = torch.tensor([math.fsum(sums) for sums in rows], dtype=torch.float64) / max(inputs.numel, 1)
    return means.to(inputs.dtype)


def _weights(energies: Tensor) -> list[float]:
    """The weights of the models, rounded as the tensors are."""
    import torch

    total = energies.sum()
    weights = torch.ones_like(energies) / len(energies) if float(total) < TINY else energies / total
    found: list[float] = weights.tolist()
    return found


PLUGIN = Sce()

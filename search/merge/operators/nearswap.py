"""NearSwap: the base takes over what the other model has nearly the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

TINY_DIFFERENCE = 1e-6
"""Differences below this count as this much."""


class NearSwap(Operator):
    """a x + (1 - a) base with a = t / abs(base - x), at most 1: elements that differ by less than t are swapped."""

    help = "the base, with elements of another model where the two are near"
    source = (
        "Alchemonaut 2024, QuartetAnemoi (model card), https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    )
    parameters: ClassVar = (
        Parameter(
            "t",
            "shared",
            "float",
            None,
            "difference up to which an element is taken from the source",
            0.0,
            search=(0.0, 0.1, 0.01),
        ),
    )
    needs_base = True
    max_sources = 1

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        t = float(shared["t"])

        def apply(block: Block, out: Tensor) -> None:
            share = inputs.scratch("share")[: out.numel()]
            torch.sub(block.base, block.sources[0], out=share)
            # The reciprocal times t, because that is what torch makes of a number over a tensor.
            share.abs_().clamp_min_(TINY_DIFFERENCE).reciprocal_().mul_(t).clamp_(0.0, 1.0)
            torch.mul(share, block.sources[0], out=out)
            out.add_(share.neg_().add_(1.0).mul_(block.base))

        return apply


PLUGIN = NearSwap()

"""Arcee Fusion: the base takes over the most important changes of another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Block, Inputs, Operator

if TYPE_CHECKING:
    from torch import Tensor

TINY_PROBABILITY = 1e-8
"""Added to every probability."""


class ArceeFusion(Operator):
    """base + (x - base) where the importance is at least median + 1.5 (third - first quartile).

    The importance of an element is abs(x - base) times KL(softmax(x) || softmax(base)) of its vector along the
    last axis. Quartiles are the order statistics floor(q (N - 1)) of all elements, exactly, where mergekit takes
    those of a random sample for N > 1,000,000. Everything depends on the sources alone: `prepare` finds
    the `divergence` of each vector and the `threshold`.
    """

    help = "the base, with the most important changes of another model"
    source = "Goddard 2024, Arcee's MergeKit, https://arxiv.org/abs/2403.13257"
    parameters: ClassVar = ()
    needs_base = True
    widens = True
    max_sources = 1
    prepares = "all_sources"

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        import torch

        from search.merge.rankings import count, cuts

        divergence = _divergence(inputs)
        size = inputs.numel

        def importance(block: Block) -> Tensor:
            return _importance(inputs, block, divergence)

        threshold = torch.zeros((), dtype=inputs.dtype)
        if size:
            ranks = [int(quarter * (size - 1)) for quarter in (0.25, 0.5, 0.75)]
            # Rank 0 is asked for as a value, not as a cut.
            table = count(inputs, importance)
            found = cuts(inputs, importance, table, [rank for rank in ranks if rank])
            lowest = min((float(importance(block).min()) for block in inputs.blocks()), default=0.0)
            values = [found[rank].value if rank else lowest for rank in ranks]
            first, median, third = (torch.tensor(value, dtype=inputs.dtype) for value in values)
            threshold = median + 1.5 * (third - first)
        return {"divergence": divergence.cpu(), "threshold": threshold}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        import torch

        from search.merge.rows import wide

        threshold = float(prepared[0]["threshold"])
        divergence = prepared[0]["divergence"].to(inputs.device)
        dtype = wide(inputs.dtype)

        def apply(block: Block, out: Tensor) -> None:
            assert block.base is not None
            kept = _importance(inputs, block, divergence) >= threshold
            delta = inputs.scratch("delta")[: out.numel()]
            torch.sub(block.sources[0], block.base, out=delta)
            out.copy_(delta.masked_fill_(~kept, 0.0).to(dtype) + block.base)

        return apply


def _importance(inputs: Inputs, block: Block, divergence: Tensor) -> Tensor:
    """(elements,) of one block; scratch memory."""
    import torch

    from search.merge.rows import as_matrix

    _, columns = as_matrix(inputs.shape, by_last=True)
    change = inputs.scratch("importance")[: block.stop - block.start]
    torch.sub(block.sources[0], block.base, out=change)
    first, last = block.start // columns, (block.stop - 1) // columns
    rows = divergence[first : last + 1].repeat_interleave(columns)
    return change.abs_().mul_(rows[block.start - first * columns :][: block.stop - block.start])


def _divergence(inputs: Inputs) -> Tensor:
    """(rows,): KL of every vector along the last axis, rounded at each step.

    On the CPU wherever the tensors are: the sums nearly cancel, so that last bits of the exponential decide
    which elements stay, and these should not depend on the device.
    """
    import torch

    from search.merge.rows import as_matrix, row_chunks, total

    rows, columns = as_matrix(inputs.shape, by_last=True)
    found = torch.zeros(rows, dtype=inputs.dtype)
    if not inputs.numel:
        return found.to(inputs.device)
    source, base = (inputs.whole(index).reshape(rows, columns) for index in (0, None))
    for chunk in row_chunks(rows, columns):
        p, q = (values[chunk].cpu().softmax(-1) + TINY_PROBABILITY for values in (source, base))
        terms = p * torch.log(p / q)
        # torch splits the sum of a single long row between threads.
        if rows == 1 and columns > 1 << 14:
            found[0] = total(terms)
        else:
            found[chunk] = terms.sum(-1)
    return found.to(inputs.device)


PLUGIN = ArceeFusion()

"""How the axes of tensors grow: outputs are copied, inputs are copied and divided among the copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.recycling.families import Sizes
from search.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Widening:
    """One kind of axis: unit `old[i]` of the source is unit i of the result, with `share[i]` of its columns.

    The shares of the copies of a unit sum to 1. `new` marks the units that the source does not have.
    """

    old: Tensor
    share: Tensor
    new: Tensor


def widenings_of(small: Sizes, large: Sizes, asymmetry: float, seed: int) -> dict[str, Widening]:
    """Kind of axis -> how it grows. Heads are copied as wholes, and stay with their key-value head."""
    import torch

    sizes = {
        "hidden": (small.hidden, large.hidden, 1),
        "mlp": (small.mlp, large.mlp, 1),
        "q": (small.heads, large.heads, small.head),
        "kv": (small.kv_heads, large.kv_heads, small.head),
    }
    result: dict[str, Widening] = {}
    for kind, (old_size, new_size, block) in sizes.items():
        old = torch.arange(new_size) % old_size
        weight = torch.ones(new_size, dtype=torch.float64)
        if asymmetry:
            generator = torch.Generator().manual_seed(derive_seed(seed, "growth", kind))
            weight += asymmetry * (2 * torch.rand(new_size, generator=generator, dtype=torch.float64) - 1)
        share = weight / torch.zeros(old_size, dtype=torch.float64).index_add_(0, old, weight)[old]
        units = (old[:, None] * block + torch.arange(block)).flatten()
        new = (torch.arange(new_size) >= old_size).repeat_interleave(block)
        result[kind] = Widening(units, share.repeat_interleave(block), new)
    q, width = result["q"], small.heads * small.head
    thirds = [q.old + third * width for third in range(3)]
    result["qkv"] = Widening(torch.cat(thirds), q.share.repeat(3), q.new.repeat(3))
    return result


def expand(tensor: Tensor, axes: tuple[str, ...], widenings: dict[str, Widening]) -> Tensor:
    """The tensor along all its axes: outputs copied, inputs copied and divided among the copies."""
    for dim, axis in enumerate(axes):
        if not axis:
            continue
        widening = widenings[axis[1:]]
        if len(widening.old) == tensor.shape[dim]:
            continue
        tensor = tensor.index_select(dim, widening.old)
        if axis.startswith("-"):
            view = [1] * tensor.ndim
            view[dim] = len(widening.share)
            tensor = tensor * widening.share.view(view).to(tensor.dtype)
    return tensor

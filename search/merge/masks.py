"""Random masks from a counter: the same bits on every device, in any order, for any block size.

Element i of a tensor gets u_i, a uniform number in [0, 1) of 31 bits, from (seed, tensor name, model
name, i) alone; a mask of density p keeps the elements with u_i < p. So masks are nested over
densities, and a candidate can be rebuilt bit for bit from its recipe.

Definition. K = the first 8 bytes (little endian) of sha256 of `meiosis mask 1`, seed, tensor name and
model name, each ended by a zero byte. For j = i // 2, z = K + (j + 1) * 0x9E3779B97F4A7C15 goes through
the finaliser of SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195):
    z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
all modulo 2^64. Even i take bits 0-30 of z, odd i take bits 32-62; u_i is that over 2^31.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from search.merge.operator import Inputs

LEVELS = 1 << 31
"""Densities are rounded to a multiple of 1 / LEVELS."""

_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mask_key(seed: int, tensor: str, model: str) -> int:
    """The 64-bit key of one stream of masks, unsigned."""
    digest = hashlib.sha256()
    for part in ("meiosis mask 1", str(seed), tensor, model):
        digest.update(part.encode() + b"\0")
    return int.from_bytes(digest.digest()[:8], "little")


def _signed(value: int) -> int:
    """The int64 with the same bits: torch has no unsigned 64-bit arithmetic, and int64 wraps alike."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


class CounterMask:
    """Zeroes the elements of one task vector that the draw drops.

    Args:
        inputs: gives scratch memory, seed and tensor name.
        model: name of the source.
        density: share of elements kept, 0 to 1.
    """

    def __init__(self, inputs: Inputs, model: str, density: float) -> None:
        self.level = min(LEVELS, max(0, round(density * LEVELS)))
        self._inputs = inputs
        self._key = mask_key(inputs.seed, inputs.name, model)

    def __call__(self, delta: Tensor, start: int) -> None:
        """Apply in place to the elements from `start` (even) on."""
        if self.level == LEVELS:
            return
        if self.level == 0:
            delta.zero_()
            return
        keep = self._draw(delta.numel(), start)
        # keep becomes all ones where u < level and all zeros elsewhere, without a slow pass over bools.
        keep.bitwise_and_(LEVELS - 1).sub_(self.level).bitwise_right_shift_(31)
        if delta.dtype == torch.float32:
            delta.view(torch.int32).bitwise_and_(keep)
        else:
            delta.mul_(keep.neg_())

    def _draw(self, elements: int, start: int) -> Tensor:
        """(elements,) int32, whose lower 31 bits are 2^31 u."""
        pairs = -(-elements // 2)
        z = self._inputs.scratch("mask counter", torch.int64)[:pairs]
        shifted = self._inputs.scratch("mask shifted", torch.int64)[:pairs]
        first = start // 2
        torch.arange(first + 1, first + 1 + pairs, out=z)
        z.mul_(_signed(_STEP)).add_(_signed(self._key))
        for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
            torch.bitwise_right_shift(z, shift, out=shifted)
            # The shift copies the sign bit; the mask makes it a shift of an unsigned number.
            z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
            if factor is not None:
                z.mul_(_signed(factor))
        # Little endian, as every platform of torch is: the lower half comes first.
        return z.view(torch.int32)[:elements]

"""Random masks from a counter: the same bits on every device, in any order, for any block size.

Element i of a tensor gets u_i, a uniform number in [0, 1) of 16 bits, from (seed, tensor name, model
name, i) alone; a mask of density p keeps the elements with u_i < p. So masks are nested over
densities, and a candidate can be rebuilt bit for bit from its recipe.

Definition. K = the first 8 bytes (little endian) of sha256 of `meiosis mask 2`, seed, tensor name and
model name, each ended by a zero byte. Each segment of 2^20 elements has two keys: for segment s,
z = K + (s + 1) * 0x9E3779B97F4A7C15 goes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014,
https://doi.org/10.1145/2660193.2660195), modulo 2^64:
    z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
and k = z mod 2^32, l = z >> 32. Each pair of neighbours in a segment shares a word: for pair j,
modulo 2^32 (the multipliers are of a search for 32-bit mixers of low bias, github.com/skeeto/hash-prospector):
    x = k + j; x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15; x ^= l; x *= 0x735A2D97; x ^= x >> 15
Even elements take the lower 16 bits of x, odd ones the upper; u is that with its highest bit turned, over
2^16 (turned, because processors compare signed numbers).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from search.merge.operator import Inputs

LEVELS = 1 << 16
"""Densities are rounded to a multiple of 1 / LEVELS."""

SEGMENT_ELEMENTS = 1 << 20

_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD_1, _WORD_2 = 0x21F0AAAD, 0x735A2D97


def mask_key(seed: int, tensor: str, model: str) -> int:
    """The 64-bit key of one stream of masks, unsigned."""
    digest = hashlib.sha256()
    for part in ("meiosis mask 2", str(seed), tensor, model):
        digest.update(part.encode() + b"\0")
    return int.from_bytes(digest.digest()[:8], "little")


def segment_keys(key: int, segment: int) -> tuple[int, int]:
    """The two 32-bit keys of a segment, unsigned."""
    z = (key + (segment + 1) * _STEP) % (1 << 64)
    z = (z ^ (z >> 30)) * _MIX_1 % (1 << 64)
    z = (z ^ (z >> 27)) * _MIX_2 % (1 << 64)
    z ^= z >> 31
    return z % (1 << 32), z >> 32


def _signed(value: int) -> int:
    """The int32 with the same bits: torch computes little with unsigned numbers, and int32 wraps alike."""
    value %= 1 << 32
    return value - (1 << 32) if value >> 31 else value


class CounterMask:
    """Zeroes the elements of one task vector that the draw drops.

    Args:
        inputs: gives scratch memory, seed and tensor name.
        model: name of the source.
        density: share of elements kept, 0 to 1.

    Attributes:
        level: density in units of 1 / LEVELS.
        key: of the stream.
    """

    def __init__(self, inputs: Inputs, model: str, density: float) -> None:
        self.level = min(LEVELS, max(0, round(density * LEVELS)))
        self.key = mask_key(inputs.seed, inputs.name, model)
        self._inputs = inputs

    def __call__(self, delta: Tensor, start: int) -> None:
        """Apply in place to the elements from `start` (even) on."""
        if self.level == LEVELS:
            return
        if self.level == 0:
            delta.zero_()
            return
        # All ones where u < level and all zeros elsewhere, without a slow pass over bools.
        keep = self.draw(delta.numel(), start).sub_(self.level).bitwise_right_shift_(31)
        if delta.dtype == torch.float32:
            delta.view(torch.int32).bitwise_and_(keep)
        else:
            delta.mul_(keep.neg_())

    def draw(self, elements: int, start: int) -> Tensor:
        """(elements,) int32 from 0 to LEVELS - 1: u of the elements from `start` (even) on. Scratch memory."""
        numbers = self._inputs.scratch("mask numbers", torch.int32)[:elements]
        for begin in range(start - start % SEGMENT_ELEMENTS, start + elements, SEGMENT_ELEMENTS):
            low, high = max(begin, start), min(begin + SEGMENT_ELEMENTS, start + elements)
            words = self._words(begin // SEGMENT_ELEMENTS, (low - begin) // 2, (high - low + 1) // 2)
            # Little endian, as every platform of torch is: the lower half comes first.
            numbers[low - start : high - start] = words.view(torch.int16)[: high - low]
        return numbers.add_(LEVELS // 2)  # signed halves, from -2^15: the same as turning the highest bit

    def _words(self, segment: int, first: int, count: int) -> Tensor:
        """(count,) int32: the words of the pairs of a segment from `first` on."""
        begin, second = segment_keys(self.key, segment)
        x = self._inputs.scratch("mask words", torch.int32)[:count]
        shifted = self._inputs.scratch("mask shifted", torch.int32)[:count]
        torch.arange(first, first + count, dtype=torch.int32, out=x)
        x.add_(_signed(begin))
        for shift, factor in ((16, _WORD_1), (15, _WORD_2), (15, None)):
            torch.bitwise_right_shift(x, shift, out=shifted)
            # The shift copies the sign bit; the mask makes it a shift of an unsigned number.
            x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
            if factor == _WORD_2:
                x.bitwise_xor_(_signed(second))
            if factor is not None:
                x.mul_(factor)
        return x

"""Which items a subset has: nested prefixes of one order per evaluator, all of about the same share.

Every candidate of a run is scored on a prefix of the same order, so all comparisons are on the same items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from search.racing.config import FitnessConfig
from search.seeds import derive_seed

Sizes = Mapping[str, int]


@lru_cache(maxsize=64)
def item_order(seed: int, evaluator: str, items: tuple[str, ...]) -> tuple[str, ...]:
    """The items in an order drawn from the run's seed, the evaluator's name and the ids: the same in every process."""
    digest = hashlib.sha256("\0".join(sorted(items)).encode()).hexdigest()
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "items", evaluator, digest)))
    known = sorted(items)
    return tuple(known[index] for index in generator.permutation(len(known)))


@dataclass(frozen=True)
class Ladder:
    """The sizes of subsets that a run uses, smallest first; the last one has all items.

    Attributes:
        blocks: the parts into which the order of every evaluator is cut, at least one item of each in a part; those
            with fewer items are not cut, they are scored whole on every rung.
        rungs: numbers of blocks, increasing.
        totals: evaluator -> number of its items.
    """

    blocks: int
    rungs: tuple[int, ...]
    totals: Sizes

    @classmethod
    def of(cls, totals: Sizes, config: FitnessConfig) -> Ladder:
        """The ladder of a run.

        Args:
            totals: evaluator -> number of its search items.
        """
        cut = [total for total in totals.values() if total > config.smallest]
        if not cut:
            blocks = min(totals.values())
            return cls(blocks, (blocks,), dict(totals))
        blocks = min(cut)
        first = max(config.first, config.smallest / blocks)
        rungs = [min(blocks, ceil(first * blocks - 1e-9))]
        while rungs[-1] < blocks:
            step = max(rungs[-1] + 1, ceil(rungs[-1] * config.growth - 1e-9))
            # What would be left is too little for a rung of its own.
            rungs.append(blocks if step * (1 + config.growth) / 2 >= blocks else step)
        return cls(blocks, tuple(rungs), dict(totals))

    def sizes(self, rung: int) -> dict[str, int]:
        """Evaluator -> items of a rung."""
        return {
            name: total if total < self.blocks else self.rungs[rung] * total // self.blocks
            for name, total in self.totals.items()
        }

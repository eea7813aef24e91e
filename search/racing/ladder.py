"""Which items a subset has: nested prefixes of one order per evaluator, all of about the same share.

Every candidate of a run is scored on a prefix of the same order, so all comparisons are on the same items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
        blocks: the parts into which the order of every evaluator is cut, at least one item of each in a part.
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
        blocks = min(totals.values())
        first = max(config.first, *(min(1.0, config.smallest / total) for total in totals.values()))
        rungs = [min(blocks, ceil(first * blocks - 1e-9))]
        while rungs[-1] < blocks:
            step = max(rungs[-1] + 1, ceil(rungs[-1] * config.growth - 1e-9))
            # What would be left is too little for a rung of its own.
            rungs.append(blocks if step * (1 + config.growth) / 2 >= blocks else step)
        return cls(blocks, tuple(rungs), dict(totals))

    def sizes(self, rung: int) -> dict[str, int]:
        """Evaluator -> items of a rung."""
        return {name: self.rungs[rung] * total // self.blocks for name, total in self.totals.items()}

    @property
    def items(self) -> int:
        """Items in all."""
        return sum(self.totals.values())

    def edges(self, evaluator: str) -> Sequence[int]:
        """Where the blocks of an evaluator begin, and the end of the last one; (blocks + 1,)."""
        return [block * self.totals[evaluator] // self.blocks for block in range(self.blocks + 1)]

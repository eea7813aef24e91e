"""What scales the hidden state between two layers of a path: genes, or a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from search.genome import Gene
from search.paths.config import ScalesConfig

NETWORK_BOUND = 3.0
"""Weights of the network lie between this and its negative."""


class Slot(NamedTuple):
    """A layer that is offered to a path.

    Attributes:
        entry: whose layer, by its name in the pool.
        layer: its number.
        repeat: how often the pool was offered before.
    """

    entry: str
    layer: int
    repeat: int

    @property
    def name(self) -> str:
        return f"{self.entry}.{self.layer}.{self.repeat}"


class Scales:
    """The factors of the paths over a pool. The first layer of a path, which nothing precedes, has the factor 1.

    Args:
        config: where they come from.
        pool: names of its entries, in order.
        depth: layers of each.
        repeats: how often they are offered.
        slots: all that can follow another layer, in order.
        group: what stands before the slash in the names of genes.
    """

    def __init__(
        self, config: ScalesConfig, pool: Sequence[str], depth: int, repeats: int, slots: Sequence[Slot], group: str
    ) -> None:
        self._config, self._depth = config, depth
        self._entry = {name: index for index, name in enumerate(pool)}
        self._layers = len(pool) * depth
        self._last_slot = self._layers * repeats - 1
        self._slot = {slot: index for index, slot in enumerate(slots)}
        self.genes = self._make_genes(pool, slots, group)

    def of(self, values: Sequence[float], path: Sequence[Slot]) -> tuple[float, ...]:
        """The factors on entry of every layer of a path, kept from growing or shrinking beyond the limit together.

        Args:
            values: (n_genes,) of the genes.
        """
        found, product, limit = [], 1.0, self._config.limit
        for before, slot in zip((None, *path), path, strict=False):
            scale = 1.0 if before is None else self._scale(values, before, slot)
            wanted = product * scale
            size = min(max(abs(wanted), 1.0 / limit), limit)
            if size != abs(wanted):
                scale = math.copysign(size, wanted) / product
            found.append(scale)
            product *= scale
        return tuple(found)

    def _scale(self, values: Sequence[float], before: Slot, slot: Slot) -> float:
        match self._config.by:
            case "none":
                return 1.0
            case "slot":
                return values[self._slot[slot]]
            case "pair":
                return values[self._number(before) * self._layers + self._number(slot)]
            case "network":
                return self._computed(values, before, slot)

    def _computed(self, values: Sequence[float], before: Slot, slot: Slot) -> float:
        """pi(i, j, t): one hidden layer of tanh, and a tanh that spans the factors with 1 at 0.

        i and j are the numbers of both layers in the pool, t is that of the slot, each brought to [-1, 1].
        """
        layers, units = max(1, self._layers - 1), self._config.hidden
        place = slot.repeat * self._layers + self._number(slot)
        inputs = [
            2 * self._number(before) / layers - 1,
            2 * self._number(slot) / layers - 1,
            2 * place / max(1, self._last_slot) - 1,
            1.0,
        ]
        total = values[-1]
        for unit in range(units):
            weights = values[4 * unit : 4 * unit + 4]
            total += values[4 * units + unit] * math.tanh(sum(w * x for w, x in zip(weights, inputs, strict=True)))
        out = math.tanh(total)
        return 1.0 + out * (self._config.high - 1.0 if out > 0 else 1.0 - self._config.low)

    def _number(self, slot: Slot) -> int:
        """Of a layer in the pool."""
        return self._entry[slot.entry] * self._depth + slot.layer

    def _make_genes(self, pool: Sequence[str], slots: Sequence[Slot], group: str) -> tuple[Gene, ...]:
        low, high = self._config.low, self._config.high
        match self._config.by:
            case "none":
                return ()
            case "slot":
                return tuple(Gene(f"{group}/{slot.name}.scale", low, high, 1.0) for slot in slots)
            case "pair":
                layers = [f"{entry}.{layer}" for entry in pool for layer in range(self._depth)]
                return tuple(Gene(f"{group}/{a}-{b}.scale", low, high, 1.0) for a in layers for b in layers)
            case "network":
                units = self._config.hidden
                inner = [f"unit{unit}.{name}" for unit in range(units) for name in ("from", "to", "at", "bias")]
                names = [*inner, *(f"out.unit{unit}" for unit in range(units)), "out.bias"]
                return tuple(Gene(f"{group}/{name}", -NETWORK_BOUND, NETWORK_BOUND, 0.0) for name in names)

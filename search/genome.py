"""Genes and genomes: what the optimiser moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GeneKind = Literal["float", "int", "bool", "choice"]


@dataclass(frozen=True)
class Gene:
    """One searched number.

    Attributes:
        name: `<group>/<source>.<parameter>`, or `<group>/<parameter>` for a shared one.
        low, high: bounds of the value.
        initial: value at which the search starts.
        kind: `int` values are rounded, `bool` values are true from 0.5 on, `choice` values are one of `choices`,
            each of which has an equal part of the range; as a number a choice is its index.
        step: values are rounded to multiples of this that lie between the bounds, if there are any.
        position: where a forward pass first meets what the gene changes: 0 before the layers (and where nobody said),
            1 + n in layer n, `search.grouping.BEHIND` after the last. Candidates that agree in all genes up to a
            position have the same hidden states there.
    """

    name: str
    low: float
    high: float
    initial: float
    kind: GeneKind = "float"
    step: float | None = None
    choices: tuple[str, ...] = ()
    position: int = 0

    @property
    def ordered(self) -> bool:
        """Whether what lies between two values is between them in effect."""
        return self.kind in ("float", "int")

    def value(self, coordinate: float) -> float | int | bool | str:
        """The value at a coordinate in [0, 1]."""
        if self.kind == "choice":
            return self.choices[min(int(coordinate * len(self.choices)), len(self.choices) - 1)]
        value = self.low + coordinate * (self.high - self.low)
        if self.kind == "bool":
            return value >= 0.5
        if self.kind == "int":
            return round(value)
        if self.step is not None:
            least, most = math.ceil(self.low / self.step), math.floor(self.high / self.step)
            if least <= most:
                return min(max(round(value / self.step), least), most) * self.step
        return min(max(value, self.low), self.high)

    def coordinate(self, value: float) -> float:
        """The coordinate of a value, clipped to [0, 1]; of a choice by its index, in the middle of its part."""
        if self.kind == "choice":
            return (value + 0.5) / len(self.choices)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True)
class Genome:
    """A point of a space: one coordinate in [0, 1] for each gene, in the order of `Space.genes`."""

    coordinates: tuple[float, ...]

    @classmethod
    def of(cls, vector: NDArray[np.float64]) -> Genome:
        """A genome from an optimiser's vector, shape (n_genes,)."""
        return cls(tuple(float(x) for x in vector))

    def vector(self) -> NDArray[np.float64]:
        """The coordinates as (n_genes,) float64."""
        return np.asarray(self.coordinates, dtype=np.float64)

"""Landscapes that are known everywhere: per-item scores of every point of a small space of merges.

A landscape is either fitted to scores of real models at a few hundred points (`Table`), or a formula (`Analytic`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Kind = Literal["nll", "margin"]

POOLS = ("search", "certify")


class Landscape(Protocol):
    """Attributes:
    groups, sources: a point has one weight for each of them, group by group.
    low, high: bounds of the weights.
    kind: whether scores are losses, or margins by which the right answer wins.
    tasks: name -> pool -> how many items.
    """

    groups: int
    sources: tuple[str, ...]
    low: float
    high: float
    kind: Kind
    tasks: Mapping[str, Mapping[str, int]]

    def scores(self, task: str, pool: str, point: Vector) -> Vector:
        """(n_items,) of a point (groups * sources,)."""
        ...


def load(name: str) -> Landscape:
    """The landscape in a parquet file, or `<formula>-<groups>`."""
    if name.endswith(".parquet"):
        return Table.read(Path(name))
    formula, _, groups = name.partition("-")
    return Analytic(formula, int(groups or 4))


def quality(landscape: Landscape, point: Vector) -> float:
    """What the certify items say, smaller is better: mean loss, or share of wrong answers, over the tasks."""
    found = []
    for task in landscape.tasks:
        scores = landscape.scores(task, "certify", point)
        found.append(float(scores.mean() if landscape.kind == "nll" else (scores <= 0).mean()))
    return float(np.mean(found))


@dataclass(frozen=True)
class Table:
    """Scores at points, and between them a quadratic with a Gaussian process on what it leaves, item by item.

    The length scale of the process is the same for all items: the one with the smallest error at points left out.

    Attributes:
        points: (n_points, groups * sources).
        values: task -> pool -> (n_points, n_items).
    """

    groups: int
    sources: tuple[str, ...]
    low: float
    high: float
    kind: Kind
    points: NDArray[np.float64]
    values: Mapping[str, Mapping[str, NDArray[np.float32]]]

    @property
    def tasks(self) -> dict[str, dict[str, int]]:
        return {task: {pool: found.shape[1] for pool, found in pools.items()} for task, pools in self.values.items()}

    def scores(self, task: str, pool: str, point: Vector) -> Vector:
        return self._row(self._unit(point.clip(self.low, self.high))[None])[0] @ self._weights[task, pool]

    def left_out_errors(self) -> tuple[float, float]:
        """Root mean square error at points left out, and standard deviation of the scores between points."""
        scale, everything = self._length, self._everything
        residuals = self._left_out(scale)
        return float(np.sqrt((residuals**2).mean())), float(everything.std(0).mean())

    @cached_property
    def _everything(self) -> NDArray[np.float64]:
        return np.concatenate(
            [found for pools in self.values.values() for found in pools.values()], axis=1, dtype=np.float64
        )

    @cached_property
    def _length(self) -> float:
        return min((0.5, 1.0, 2.0, 4.0, 8.0), key=lambda length: float((self._left_out(length) ** 2).mean()))

    def _left_out(self, length: float) -> NDArray[np.float64]:
        inverse = np.linalg.inv(self._system(length))
        n = len(self.points)
        solved = inverse[:n, :n] @ self._everything
        return np.asarray(solved / np.diag(inverse)[:n, None])

    def _system(self, length: float) -> NDArray[np.float64]:
        """Kriging with a quadratic trend: kernel, and the trend's columns as conditions."""
        unit = self._unit(self.points)
        trend = _quadratic(unit)
        n, p = trend.shape
        system = np.zeros((n + p, n + p))
        system[:n, :n] = _kernel(unit, unit, length) + 1e-4 * np.eye(n)
        system[:n, n:], system[n:, :n] = trend, trend.T
        system[n:, n:] = -1e-10 * np.eye(p)
        return system

    @cached_property
    def _weights(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        system = self._system(self._length)
        found = {}
        for task, pools in self.values.items():
            for pool, values in pools.items():
                right = np.concatenate(
                    [values, np.zeros((len(system) - len(values), values.shape[1]))], dtype=np.float64
                )
                found[task, pool] = np.linalg.solve(system, right)
        return found

    def _row(self, unit: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate(
            [_kernel(unit, self._unit(self.points), self._length), _quadratic(unit)], axis=1, dtype=np.float64
        )

    def _unit(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return (points - self.low) / (self.high - self.low) * 2 - 1

    def write(self, path: Path) -> None:
        """As parquet: a row for every point, its scores as one list of 16-bit numbers per task and pool."""
        columns = {"point": [row.tolist() for row in self.points]}
        arrays = {"point": pa.array(columns["point"], pa.list_(pa.float32()))}
        for task, pools in self.values.items():
            for pool, found in pools.items():
                arrays[f"{task}/{pool}"] = pa.array(list(found.astype(np.float16)), pa.list_(pa.float16()))
        about = {"groups": self.groups, "sources": self.sources, "low": self.low, "high": self.high, "kind": self.kind}
        table = pa.table(arrays).replace_schema_metadata({"landscape": json.dumps(about)})
        pq.write_table(table, path, compression="zstd", compression_level=19)

    @classmethod
    def read(cls, path: Path) -> Table:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"landscape"])
        values: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name in table.column_names[1:]:
            task, _, pool = name.partition("/")
            values.setdefault(task, {})[pool] = np.stack(table[name].to_numpy()).astype(np.float32)
        points = np.stack(table["point"].to_numpy()).astype(np.float64)
        return cls(about["groups"], tuple(about["sources"]), about["low"], about["high"], about["kind"], points, values)


@dataclass(frozen=True)
class Analytic:
    """A formula: every task wants other weights, every item a little other ones than its task.

    `bowl` has losses that grow with the square of the distance; `valley` has them narrow in one direction that mixes
    the genes; `answers` has the margins of right answers, whose difficulty varies more than candidates do.
    """

    formula: str
    groups: int
    sources: tuple[str, ...] = ("a", "b", "c")
    low: float = -0.2
    high: float = 1.4
    items: tuple[int, int] = (150, 400)

    @property
    def kind(self) -> Kind:
        return "margin" if self.formula == "answers" else "nll"

    @property
    def tasks(self) -> dict[str, dict[str, int]]:
        return {f"task_{source}": dict(zip(POOLS, self.items, strict=True)) for source in self.sources}

    def scores(self, task: str, pool: str, point: Vector) -> Vector:
        place = self._places[task, pool]
        moved = (point.clip(self.low, self.high) - self._optima[task]) @ self._turn
        shared = np.square(moved).mean()
        own = place.tilt @ moved / np.sqrt(len(moved))
        if self.kind == "margin":
            return np.asarray(2.5 * (1.0 - 2.0 * shared) + 0.4 * own - place.level)
        return np.asarray(np.maximum(2.0 + place.level + place.slope * shared + 0.3 * own, 0.0))

    @cached_property
    def _turn(self) -> NDArray[np.float64]:
        n = self.groups * len(self.sources)
        if self.formula != "valley":
            return np.eye(n)
        turned = np.linalg.qr(np.random.default_rng(7).normal(size=(n, n)))[0]
        return np.asarray(turned * np.geomspace(0.3, 2.0, n))

    @cached_property
    def _optima(self) -> dict[str, Vector]:
        random = np.random.default_rng(11)
        # A task is best where its own source has most weight.
        return {
            f"task_{source}": (
                0.25
                + 0.5 * (np.arange(len(self.sources)) == index)
                + random.normal(0, 0.15, (self.groups, len(self.sources)))
            ).ravel()
            for index, source in enumerate(self.sources)
        }

    @cached_property
    def _places(self) -> dict[tuple[str, str], _Items]:
        random = np.random.default_rng(13)
        n = self.groups * len(self.sources)
        found = {}
        for task in self.tasks:
            for pool, count in zip(POOLS, self.items, strict=True):
                level = random.normal(0, 1.2 if self.kind == "margin" else 0.8, count)
                found[task, pool] = _Items(level, random.gamma(4, 0.25, count), random.normal(size=(count, n)))
        return found


@dataclass(frozen=True)
class _Items:
    level: Vector
    slope: Vector
    tilt: NDArray[np.float64]


def _kernel(one: NDArray[np.float64], other: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.asarray(np.exp(-np.maximum(squared, 0) / (2 * length**2)))


def _quadratic(unit: NDArray[np.float64]) -> NDArray[np.float64]:
    first, second = np.triu_indices(unit.shape[1])
    return np.concatenate([np.ones((len(unit), 1)), unit, unit[:, first] * unit[:, second]], axis=1)


def names(landscape: Landscape) -> Sequence[str]:
    """`group0/a`, ... in the order of a point."""
    return [f"group{group}/{source}" for group in range(landscape.groups) for source in landscape.sources]

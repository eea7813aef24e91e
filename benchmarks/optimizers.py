"""Which optimiser fits which genome: cheap landscapes shaped like merges, over several seeds.

A landscape has groups of layers and sources, each source with a task of its own and items of its own. A candidate is
scored by the share of items it solves, so what an optimiser is told is coarse and depends on the draw of items; what is
reported is how far the candidate that it would choose is from the optimum in truth, as a share of that of the start:
0 the optimum, 1 no progress. Mixed genomes add an operator for every group, each with an optimum of its own, and genes
that leave sources out of which some harm.

    python -m benchmarks.optimizers --seeds 10 --budget 300
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from evaluators.base import Scores
from search.genome import Gene
from search.objective import Term
from search.optimizer import LearnsFromResults, Problem, Result, Vector
from search.optimizers import optimizer_named

OPTIMIZERS = (
    "diagonal_cma",
    "full_cma",
    "natural_niches",
    "natural_niches:crossover=pure",
    "map_elites",
    "TwoPointsDE",
    "DiscreteOnePlusOne",
    "random_search",
)
LANDSCAPES = {
    "6 numbers": (2, 3, 1, False),
    "12 numbers": (4, 3, 1, False),
    "24 numbers": (8, 3, 1, False),
    "48 numbers": (16, 3, 1, False),
    "96 numbers": (32, 3, 1, False),
    "32 numbers, 4 sources": (8, 4, 1, True),
    "128 numbers, 4 sources": (32, 4, 1, True),
    "24 numbers, 8 operators": (8, 3, 3, False),
    "72 numbers, 24 operators": (24, 3, 3, False),
    "32 numbers, 8 operators, 4 sources": (8, 4, 3, True),
    "24 operators": (24, 0, 4, False),
}
"""Name -> groups, sources, operators to choose from, whether sources can be left out."""


class Landscape:
    """Items that a merge solves; `groups` x `sources` weights, an operator for every group, sources that take part."""

    def __init__(self, groups: int, sources: int, operators: int, subset: bool, seed: int, items: int = 200) -> None:
        self._random = random = np.random.default_rng(seed)
        self._groups, self._sources, self._operators, self._subset = groups, sources, operators, subset
        self._items = items
        importance = random.exponential(size=groups)
        self._importance = importance / importance.sum()
        tasks = max(sources, 1)
        # What is best depends on the operator; sources pull at each other in a group.
        self._best = random.uniform(0.1, 0.9, (operators, groups, tasks))
        self._harmful = random.permutation(tasks) == 0 if subset else np.zeros(tasks, bool)
        self._penalty = random.exponential(0.15, (groups, operators))
        self._penalty -= self._penalty.min(axis=1, keepdims=True)
        self._coupling = random.normal(0, 0.25, (groups, tasks, tasks))
        self._levels = random.normal(0.06, 0.06, (tasks, items))
        self._tastes = random.normal(0, 0.1, (tasks, items, groups))

    @property
    def genes(self) -> tuple[Gene, ...]:
        genes = [Gene(f"all/{s}.included", 0, 1, 0.75, "bool") for s in range(self._sources)] if self._subset else []
        names = tuple(str(operator) for operator in range(self._operators))
        for group in range(self._groups):
            if self._operators > 1:
                genes.append(Gene(f"{group}/operator", 0, len(names) - 1, 0, "choice", None, names, 1 + group))
            genes += [Gene(f"{group}/{s}.weight", 0, 1, 0.4, position=1 + group) for s in range(self._sources)]
        return tuple(genes)

    def _distances(self, point: Vector) -> tuple[np.ndarray, np.ndarray]:
        """How far every task is from its best, (tasks,), and by group, (groups, tasks)."""
        values = iter(gene.value(x) for gene, x in zip(self.genes, point, strict=True))
        taken = np.array([next(values) for _ in range(self._sources)], float) if self._subset else np.ones(1)
        operators, weights = np.zeros(self._groups, int), np.zeros((self._groups, max(self._sources, 1)))
        for group in range(self._groups):
            operators[group] = int(str(next(values))) if self._operators > 1 else 0
            weights[group, : self._sources] = [float(next(values)) for _ in range(self._sources)]
        weights = weights * taken
        rows = np.arange(self._groups)
        wanted = np.where(self._harmful, 0.0, self._best[operators, rows]) if self._sources else weights
        away = weights - wanted
        harm = np.where(self._harmful, weights**2, 0.0).sum(axis=1, keepdims=True)
        pulled = (away + np.einsum("gst,gt->gs", self._coupling, away)) ** 2
        by_group = pulled + harm + self._penalty[rows, operators][:, None]
        return np.asarray(self._importance @ by_group), by_group

    def truth(self, point: Vector) -> float:
        """The mean over the tasks: 0 at the best weights of the best operators."""
        return float(self._distances(point)[0].mean())

    def scores(self, point: Vector) -> Scores:
        """What is measured: 1 for every item that is solved."""
        total, by_group = self._distances(point)
        own = np.einsum("tig,gt->ti", self._tastes, by_group * self._importance[:, None] * np.sqrt(self._groups))
        solved = (self._levels - total[:, None] - own > 0).astype(float).ravel()
        return Scores(tuple(map(str, range(solved.size))), {"acc": solved}, np.ones(solved.size))


def left_over(name: str, landscape: Landscape, budget: int, window: int, seed: int) -> tuple[float, float]:
    """The true distance of the best candidate as a share of that of the start, and milliseconds for an ask and tell."""
    genes = landscape.genes
    start = np.array([gene.coordinate(gene.initial) for gene in genes])
    name, _, settings = name.partition(":")
    options = dict(setting.split("=") for setting in settings.split(",") if setting)
    terms = (Term("e.acc", 1.0, -1),)
    optimizer = optimizer_named(name, options)(Problem(start, budget, window, seed, 0.1, genes, 1, terms))
    optimizer.suggest(start)
    open_: deque[Vector] = deque()
    best, chosen, spent = np.inf, start, 0.0
    for number in range(budget + window - 1):
        began = time.perf_counter()
        if number < budget:
            open_.append(optimizer.ask())
        spent += time.perf_counter() - began
        if len(open_) < window and number < budget:
            continue
        point = open_.popleft()
        scores = landscape.scores(point)
        loss = -float(scores.values["acc"].mean())
        if loss < best:
            best, chosen = loss, point
        began = time.perf_counter()
        if isinstance(optimizer, LearnsFromResults):
            optimizer.tell_result(point, Result(loss, (loss,), scores={"e": scores}))
        else:
            optimizer.tell(point, loss)
        spent += time.perf_counter() - began
    return landscape.truth(chosen) / landscape.truth(start), 1000 * spent / budget


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--landscapes", nargs="+", default=list(LANDSCAPES))
    given = parser.parse_args(arguments)
    print(
        f"| {given.budget} candidates, median of {given.seeds} seeds (quartiles) | "
        + " | ".join(given.landscapes)
        + " |"
    )
    print("|---" * (len(given.landscapes) + 1) + "|")
    for name in given.optimizers:
        cells = []
        for title in given.landscapes:
            found = [
                left_over(name, Landscape(*LANDSCAPES[title], seed=seed), given.budget, given.window, seed)
                for seed in range(given.seeds)
            ]
            low, middle, high = statistics.quantiles([share for share, _ in found], n=4)
            cost = statistics.median(cost for _, cost in found)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f}), {cost:.1f} ms")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

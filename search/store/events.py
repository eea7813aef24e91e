"""What a history records: asks, trials, what became of the budget, and the end of the run.

Each event knows which part of it is decided by the run (`deterministic`) and which is circumstance:
when, where, how long, after how many attempts. Two runs of the same search agree on the first.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluators.base import ItemPool, Scores

Content = tuple[object, ...]
"""Nested tuples of str, int, bool, bytes and None; floats as the bytes of their bits."""


class Recorded(ABC):
    """Equality and hash by content, in which NaN equals NaN and 0.0 differs from -0.0."""

    @abstractmethod
    def deterministic(self) -> Content:
        """What must be equal between a run and its repetition: resumed, or on other workers."""

    def circumstances(self) -> Content:
        """The rest: times, worker, attempts, wording of a failure."""
        return ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Recorded)
            and self.deterministic() == other.deterministic()
            and self.circumstances() == other.circumstances()
        )

    def __hash__(self) -> int:
        return hash(self.deterministic())


@dataclass(frozen=True, eq=False)
class Ask(Recorded):
    """A candidate enters the run.

    Attributes:
        candidate: its number, from 0.
        origin: where it comes from: `parent:python`, `baseline:uniform_soup`, `optimizer` ...
        genome: flat genome in [0, 1], or None when the candidate is no point of the space.
        recipe_hash: `Recipe.hash`.
        recipe: canonical JSON of the recipe where the genome does not determine it.
    """

    candidate: int
    origin: str
    genome: tuple[float, ...] | None
    recipe_hash: str
    recipe: str | None = None

    def deterministic(self) -> Content:
        genome = None if self.genome is None else tuple(bits(gene) for gene in self.genome)
        return ("ask", self.candidate, self.origin, genome, self.recipe_hash, self.recipe)


@dataclass(frozen=True, eq=False)
class Trial(Recorded):
    """One evaluation of one candidate on one pool of items.

    Attributes:
        candidate, items: which one; unique in a run.
        metrics: `<evaluator>.<metric>` -> value; empty after a failure.
        loss: what the optimiser was told, or None where it was told nothing.
        feasible: whether the constraints hold.
        scores: evaluator name -> per-item scores; empty after a failure. Names contain no colon.
        failure_kind: one of `search.pool.FailureKind`, or None for a success.
        failure_message: one line for people.
        weights_sha256: hash of the merged tensors where it was asked for.
        recorded_at: Unix time in seconds.
        worker: name of the worker, for people.
        attempts: how often the job was started.
        node: host name of the machine that evaluated.
        started_at: Unix time in seconds at which the last attempt was sent to a worker, by the driver's clock.
        queue_seconds: from submission to that moment.
        bytes_read: bytes of the models that the merge read.
        bytes_moved: bytes of messages between driver and worker.
        layers_run: layers of the model that ran, once for every forward pass.
        layers_reused: layers that did not have to, since their result was known from an earlier candidate.
        censored: whether it was stopped because it is worse than what it was compared with.
        scored: items that were scored (at most, in a failure), where these are not all of the pool; metrics are then
            estimates for all.
    """

    candidate: int
    items: ItemPool
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    feasible: bool = True
    scores: Mapping[str, Scores] = field(default_factory=dict)
    failure_kind: str | None = None
    failure_message: str = ""
    weights_sha256: str | None = None
    recorded_at: float = 0.0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    worker: str = ""
    attempts: int = 1
    node: str = ""
    started_at: float = 0.0
    queue_seconds: float = 0.0
    bytes_read: int = 0
    bytes_moved: int = 0
    layers_run: int = 0
    layers_reused: int = 0
    censored: bool = False
    scored: int | None = None

    @property
    def has_all_search_items(self) -> bool:
        """Whether it was scored on every search item."""
        return self.items == "search" and not self.failure_kind and self.scored is None

    def deterministic(self) -> Content:
        return (
            "trial",
            self.candidate,
            self.items,
            tuple((name, bits(value)) for name, value in sorted(self.metrics.items())),
            None if self.loss is None else bits(self.loss),
            bool(self.feasible),
            tuple((name, _scores_content(scores)) for name, scores in sorted(self.scores.items())),
            self.failure_kind,
            self.weights_sha256,
            bool(self.censored),
            self.scored,
        )

    def circumstances(self) -> Content:
        seconds = (
            self.recorded_at,
            self.merge_seconds,
            self.evaluate_seconds,
            self.started_at,
            self.queue_seconds,
        )
        moved = (self.bytes_read, self.bytes_moved, self.layers_run, self.layers_reused)
        return (*map(bits, seconds), self.worker, self.node, self.attempts, self.failure_message, *moved)


@dataclass(frozen=True, eq=False)
class LimitReached(Recorded):
    """A limit of the budget is used up: nothing more is asked, what is in flight is finished.

    It is recorded because nobody can tell from a history when time ran out.

    Attributes:
        limit: `item_evaluations`, `gpu_hours` or `wall_clock`.
        used: how much was used then; items, hours and seconds.
    """

    limit: str
    used: float

    def deterministic(self) -> Content:
        return ("limit", self.limit)

    def circumstances(self) -> Content:
        return (bits(self.used),)


@dataclass(frozen=True, eq=False)
class Extended(Recorded):
    """The user changed the budget: `budget`, the JSON of a `search.budget.Budget`, holds from here on."""

    budget: str

    def deterministic(self) -> Content:
        return ("extended", self.budget)


@dataclass(frozen=True, eq=False)
class End(Recorded):
    """The run is over: the winning candidate, or None, and the verdict as JSON. An extended run has several."""

    winner: int | None
    verdict: str

    def deterministic(self) -> Content:
        return ("end", self.winner, self.verdict)


Event = Ask | Trial | LimitReached | Extended | End


def bits(value: float) -> bytes:
    """The 8 bytes of a float. All NaNs are one: their payload depends on the processor, not on the run."""
    return struct.pack("<d", math.nan if math.isnan(value) else value)


def _scores_content(scores: Scores) -> Content:
    return (
        tuple(scores.items),
        tuple((name, array_bits(values)) for name, values in sorted(scores.values.items())),
        array_bits(scores.weights),
    )


def array_bits(values: NDArray[np.float64]) -> bytes:
    """`bits` of every element."""
    array = np.array(values, "<f8")
    array[np.isnan(array)] = np.nan
    return array.tobytes()

"""What the driver asks of a pool of workers, and what comes back.

Two pools implement it: `search.local_pool` in this process, `cluster.pool` on Ray. Messages carry
names, hashes, parameters and scores, never weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from evaluators.base import EvaluatorSpec, ItemPool, Scores
from search.racing.race import Race
from search.recipe import ModelRef, Recipe
from search.soups.plan import LearnSoup

if TYPE_CHECKING:
    from search.progress import Progress

FailureKind = Literal["error", "not_finite", "out_of_memory", "timeout", "crash"]


@dataclass(frozen=True)
class WorkerPlan:
    """All that a worker must know before the first job: plain data, the same for every worker.

    Attributes:
        models: model name -> folder and content hash.
        base: name of the model whose config and tokenizer the live model has.
        evaluators: the evaluators of the config.
        device: torch device, or `auto` for a GPU where the worker has one.
        gpus: GPUs that a worker has for itself; the live model is laid over two or more.
        dtype: dtype of the live model, or None for that of the base.
        threads: torch threads on the CPU. Part of the run: sums of floats depend on it.
        seed: seed of the run.
        beside_live: bytes that a worker needs on each of several GPUs beside its part of the live model; None
            where it is not known.
        beside_learning: the same beside both the live model and one that learns.
        reuse_bytes: most bytes of hidden states that a worker keeps on the devices of its model, for candidates whose
            first layers are those of an earlier one; 0: none. What is computed does not depend on it.
        candidates_per_forward: how many a worker takes at once, see `search.batched`.
        prepared_folder: node-local folder in which workers share what `Operator.prepare` computed. None
            leaves it to the pool: on Ray a folder of each node, in this process memory alone.
    """

    models: Mapping[str, ModelRef]
    base: str
    evaluators: tuple[EvaluatorSpec, ...]
    device: str = "auto"
    dtype: str | None = None
    threads: int = 1
    seed: int = 0
    prepared_folder: str | None = None
    gpus: int = 1
    beside_live: int | None = None
    beside_learning: int | None = None
    reuse_bytes: int = 0
    candidates_per_forward: int = 1


@dataclass(frozen=True)
class Job:
    """One candidate to merge and score on one pool of items. `(candidate, items)` is unique in a run."""

    candidate: int
    recipe: Recipe
    items: ItemPool
    hash_weights: bool = False
    """Whether the outcome must carry the hash of the merged tensors (costs a pass over them)."""
    learn: LearnSoup | None = None
    """Better weights than the recipe's, to be learned from there and returned among the metrics."""
    prefix: tuple[int, ...] = ()
    """What its layers are made of, see `search.prefix.affinity`: jobs that begin alike go to the same worker."""
    race: Race | None = None
    """How far it is scored; None: on all items of the pool."""

    @property
    def key(self) -> tuple[int, ItemPool]:
        return self.candidate, self.items


@dataclass(frozen=True)
class Failure:
    """Why a trial has no scores. `message` is one line; `detail` may hold a traceback."""

    kind: FailureKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        scores: evaluator name -> per-item scores; empty after a failure.
        metrics: `<evaluator>.<metric>` -> value; empty after a failure.
        weights_sha256: hash of the merged tensors, where the job asked for it.
        worker: name of the worker, for people.
        attempts: how often the job was started, 1 unless workers died under it.
        node: host name of the worker's machine.
        started_at: Unix time in seconds at which the pool started the last attempt, by the driver's clock.
        queue_seconds: from submission to that moment.
        bytes_read: bytes of the models that the merge read.
        bytes_moved: bytes of messages between driver and worker.
        layers_run: layers of the model that ran, once for every forward pass.
        layers_reused: layers that did not have to, since their result was known from an earlier candidate.
        censored: whether it was stopped in its race: the scores are of fewer items than it might have had.
    """

    candidate: int
    items: ItemPool
    scores: Mapping[str, Scores] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    weights_sha256: str | None = None
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

    @property
    def key(self) -> tuple[int, ItemPool]:
        return self.candidate, self.items


@runtime_checkable
class Publisher(Protocol):
    """A pool that shows the state of the run elsewhere, as that on Ray does in its metrics."""

    def publish(self, progress: Progress) -> None:
        """Show the state."""


class Pool(Protocol):
    """A supervised set of workers. One job per worker at a time; more may be submitted and wait."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    @property
    def busy(self) -> int:
        """How many of them work now."""

    def submit(self, job: Job) -> None:
        """Queue a job. Jobs start in the order of submission, or nearly so: see `Job.prefix`."""

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Outcomes that are there, after at least one came or `timeout` seconds went by.

        Every submitted job comes back exactly once, as a success or a failure, whatever dies, unless
        it was cancelled. Raises `WorkerError` when no worker can be kept alive.
        """

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        """Forget a job; if it runs, its outcome is dropped."""

    def close(self) -> None:
        """Release workers and whatever this pool started. May be called twice."""

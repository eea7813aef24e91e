"""The body of a worker that evaluates several candidates at once: see `search.batched`.

What draws from chance or looks at more than outputs is evaluated candidate by candidate, after the others: evaluators
without `plain_forward`, and whole jobs that race, learn, take a path or have a placebo for a model.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from evaluators.base import Scores
from search.checkpoints.fingerprint import hash_tensors
from search.errors import MeiosisError, UserError
from search.evaluation import Evaluation, complete, failure_of, not_finite, require_device
from search.model_state import model_state
from search.pool import Job, Outcome, WorkerPlan
from search.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from search.batched import BatchedModel


@dataclass
class _Slot:
    """A candidate among others."""

    number: int
    job: Job
    sha256: str | None = None
    merge_seconds: float = 0.0
    bytes_read: int = 0
    layers_run: int = 0
    layers_reused: int = 0
    scores: dict[str, Scores] = field(default_factory=dict)
    error: BaseException | None = None


class BatchEvaluation(Evaluation):
    """Evaluates as many candidates in one forward pass as the plan says.

    Args:
        plan: see `Evaluation`.

    Raises:
        UserError: torch cannot run this model so, or it is laid over several GPUs.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self._count = plan.candidates_per_forward
        super().__init__(plan)
        if len(self._devices) > 1:
            raise UserError(
                "cluster.candidates_per_forward: a model over several GPUs takes one candidate; set it to 1"
            )
        self._batched().check()

    def _build(self) -> None:
        self._batch: BatchedModel | None = None
        super()._build()

    def _batched(self) -> BatchedModel:
        from search.batched import BatchedModel

        if self._batch is None:
            self._batch = BatchedModel(self._model.model, self._count)
        return self._batch

    def run(self, job: Job) -> Outcome:
        return self.run_many([job])[0]

    def run_many(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes of jobs, in their order; see `run`."""
        found: list[Outcome] = []
        for group in _groups(jobs, self._count):
            found += [super().run(group[0])] if _goes_alone(group[0]) else self._together(group)
        return found

    def _together(self, jobs: Sequence[Job]) -> list[Outcome]:
        import torch

        began = time.perf_counter()
        self._use_models_of(jobs[0].recipe)
        if self._changed:
            self._build()
        slots = [_Slot(number, job) for number, job in enumerate(jobs)]
        with torch.no_grad():
            for slot in slots:
                try:
                    self._put(slot)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - the outcome of this candidate
                    self._fail([slot], error)
            try:
                self._score_together([slot for slot in slots if slot.error is None])
            except (Exception, SystemExit) as error:  # noqa: BLE001 - what a plug-in raises is the outcome of trials
                self._fail(slots, error)
            for slot in slots:
                try:
                    self._score_alone(slot)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - what a plug-in raises is the outcome
                    self._fail([slot], error)
        seconds = (time.perf_counter() - began - sum(slot.merge_seconds for slot in slots)) / len(slots)
        return [self._outcome(slot, max(0.0, seconds)) for slot in slots]

    def _put(self, slot: _Slot) -> None:
        """Merge a candidate, and take its weights."""
        began = time.perf_counter()
        with self._merged(slot.job.recipe) as candidate:
            slot.bytes_read = candidate.bytes_read
            slot.sha256 = hash_tensors(candidate.tensors()) if slot.job.hash_weights else None
            self._batched().put(slot.number)
        slot.merge_seconds = time.perf_counter() - began

    def _score_together(self, slots: Sequence[_Slot]) -> None:
        plain = {name: each for name, each in self._evaluators.items() if each.plain_forward}
        if not slots or not plain:
            return
        batch, model = self._batched(), self._model.model
        batch.pad([slot.number for slot in slots])
        state = model_state(model)
        self._changed = True
        try:
            for name, evaluator in plain.items():
                items = evaluator.items(slots[0].job.items)
                running = [slot for slot in slots if slot.error is None]
                before = batch.passes
                with seeded(derive_seed(self._seed, "evaluator", name), *self._devices):
                    found = batch.evaluate(evaluator, [slot.number for slot in running], items)
                for slot in running:
                    scores = found[slot.number]
                    slot.layers_run += (batch.passes - before) * batch.layers
                    if isinstance(scores, BaseException):
                        self._fail([slot], scores)
                        continue
                    try:
                        slot.scores[name] = complete(name, scores, items)
                    except MeiosisError as error:
                        self._fail([slot], error)
                self._changed = model_state(model) != state
                if self._changed:
                    raise MeiosisError(f"evaluator '{name}' changed the weights of the model; it must work on a copy")
        finally:
            self._changed = self._changed or model_state(model) != state

    def _score_alone(self, slot: _Slot) -> None:
        """What the evaluators that want a model for themselves find."""
        job = slot.job
        items = {name: e.items(job.items) for name, e in self._evaluators.items() if not e.plain_forward}
        if slot.error is not None or not items:
            return
        if self._changed:
            self._build()
        with self._merged(job.recipe) as candidate:
            slot.bytes_read += candidate.bytes_read
            watching = self._reuse.watching(self._model.model, candidate.targets, candidate.made_by, candidate.along)
            with watching as watch:
                slot.scores |= self._scores_of(items, watch)
        slot.layers_run += self._reuse.layers_run
        slot.layers_reused += self._reuse.layers_reused

    def _fail(self, slots: Sequence[_Slot], error: BaseException) -> None:
        self._merger.invalidate()
        for slot in slots:
            slot.error = slot.error or error
        for device in self._devices:
            require_device(device)

    def _outcome(self, slot: _Slot, seconds: float) -> Outcome:
        metrics: dict[str, float] = {}
        scores = {name: slot.scores[name] for name in self._evaluators if name in slot.scores}
        if slot.error is None:
            try:
                metrics = self._aggregate(scores)
            except Exception as error:  # noqa: BLE001 - what a plug-in raises is the outcome of this candidate
                slot.error = error
        failure = not_finite(metrics) if slot.error is None else failure_of(slot.error)
        return Outcome(
            slot.job.candidate,
            slot.job.items,
            scores={} if failure else scores,
            metrics={} if failure else metrics,
            failure=failure,
            weights_sha256=None if slot.error else slot.sha256,
            merge_seconds=slot.merge_seconds,
            evaluate_seconds=seconds,
            worker=self.name,
            node=platform.node(),
            bytes_read=slot.bytes_read,
            layers_run=slot.layers_run,
            layers_reused=slot.layers_reused,
        )


def _goes_alone(job: Job) -> bool:
    """Whether a job is evaluated by itself, whatever else waits: its bits depend on nothing but the job."""
    placebo = any(ref.random_delta is not None for ref in job.recipe.models.values())
    return job.learn is not None or job.race is not None or job.recipe.scales is not None or placebo


def _groups(jobs: Sequence[Job], count: int) -> Iterator[Sequence[Job]]:
    """Jobs that are evaluated together: at most `count` in a row, on the same items."""
    for (_, alone), found in groupby(jobs, key=lambda job: (job.items, _goes_alone(job))):
        group, size = list(found), 1 if alone else count
        yield from (group[start : start + size] for start in range(0, len(group), size))

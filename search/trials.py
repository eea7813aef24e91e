"""Between what a pool returns and what the history holds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict

from search.candidate import Candidate
from search.objective import Judgement
from search.pool import Failure, FailureKind, Outcome
from search.store.events import Ask, Trial


def ask_event(candidate: Candidate) -> Ask:
    """The record of an ask. Recipes of generation 0 are written out, the others follow from the genome."""
    return Ask(
        candidate=candidate.id,
        origin=candidate.origin,
        genome=candidate.genome.coordinates if candidate.genome else None,
        recipe_hash=candidate.recipe_hash,
        recipe=None if candidate.genome else _written_out(candidate),
    )


def _written_out(candidate: Candidate) -> str:
    rules: object = [rule.model_dump(mode="json") for rule in candidate.recipe.rules]
    if candidate.learn is not None:
        rules = {"rules": rules, "learn": asdict(candidate.learn)}
    return json.dumps(rules, separators=(",", ":"))


def may_be_best(trial: Trial, rotate: bool = False) -> bool:
    """Whether a trial on the search items can be the best one: not where it was stopped early, and not where it has
    other items than the rest: the best of many rough estimates is the luckiest one.

    Args:
        rotate: whether every candidate has other items, and no optimiser to rank them all is at hand.
    """
    complete = not trial.censored and not (rotate and trial.scored is not None)
    return trial.feasible and trial.loss is not None and complete


def trial_event(outcome: Outcome, judgement: Judgement | None, feasible: bool, scored: int | None = None) -> Trial:
    """The record of a result; no judgement while the parents that normalise the loss are not all known."""
    return Trial(
        candidate=outcome.candidate,
        items=outcome.items,
        metrics=dict(outcome.metrics),
        loss=judgement.loss if judgement else None,
        feasible=feasible,
        scores=dict(outcome.scores),
        failure_kind=outcome.failure.kind if outcome.failure else None,
        failure_message=outcome.failure.message if outcome.failure else "",
        weights_sha256=outcome.weights_sha256,
        recorded_at=time.time(),
        merge_seconds=outcome.merge_seconds,
        evaluate_seconds=outcome.evaluate_seconds,
        worker=outcome.worker,
        attempts=outcome.attempts,
        node=outcome.node,
        started_at=outcome.started_at,
        queue_seconds=outcome.queue_seconds,
        bytes_read=outcome.bytes_read,
        bytes_moved=outcome.bytes_moved,
        layers_run=outcome.layers_run,
        layers_reused=outcome.layers_reused,
        censored=outcome.censored,
        scored=scored,
    )


def outcome_of(trial: Trial) -> Outcome:
    """A recorded result as the pool returned it."""
    kind: FailureKind | None = trial.failure_kind  # type: ignore[assignment]  # written from a FailureKind
    return Outcome(
        trial.candidate,
        trial.items,
        scores=trial.scores,
        metrics=trial.metrics,
        failure=Failure(kind, trial.failure_message) if kind else None,
        weights_sha256=trial.weights_sha256,
        merge_seconds=trial.merge_seconds,
        evaluate_seconds=trial.evaluate_seconds,
        worker=trial.worker,
        attempts=trial.attempts,
        node=trial.node,
        started_at=trial.started_at,
        queue_seconds=trial.queue_seconds,
        bytes_read=trial.bytes_read,
        bytes_moved=trial.bytes_moved,
        layers_run=trial.layers_run,
        layers_reused=trial.layers_reused,
        censored=trial.censored,
    )


def usable_metrics(trial: Trial) -> Mapping[str, float] | None:
    """The metrics of a trial, None if it failed."""
    return None if trial.failure_kind else trial.metrics
